"""Start the processes of a run on this machine and see every one of them to its end.

Each child gets its first message (the bootstrap) as a JSON line on stdin, answers with JSON lines on stdout, and writes
everything else to its log file. stdin stays open as a lifeline: when this process goes away, however it goes, the
children read end-of-file and leave. One thread per child reads its stdout, one waits for its end; both put what they
saw into one queue, which `Supervisor.run` works off. So nothing is polled.

To a child     {"command": "stop"}   {"command": "abort", "rank": …, "message": …}   and what the caller has to say
From a child   {"event": "error", "message": …, "exit_code": …, "consequence": …, "lost": …} and what the caller knows
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

import psutil

from smolcluster.kinds import JsonObject
from smolcluster.transport.security import TOKEN_VARIABLE

logger = logging.getLogger(__name__)

EXIT_FAILED = 3
EXIT_INTERRUPTED = 130

# Ctrl-C ends within 10 s (CONTRACT section 2). The rest of the ten seconds is for killing, summary and picture.
STOP_GRACE_S = 7.5
# A lost rank ends the run within patience + 2 s. What a rank reports as a consequence ("rank 1 is gone") comes after
# the patience has passed, so then little more than a second is left for the others to leave by themselves.
CONSEQUENCE_GRACE_S = 1.5
# Once only ranks are left that the others call lost, they get this long: one may be about to say why it fails.
LOST_GRACE_S = 0.5
# Looks per patience whether a child was suspended (SIGSTOP): it cannot say so, and before all ranks have joined nobody
# else notices.
LOOKS_PER_PATIENCE = 10
# A rank that ends with an error of its own so many times in a row will do so again. Who was killed may not.
MAX_OWN_DEATHS = 3
# On Windows a waiting main thread is not woken by Ctrl-C: it has to look up now and then for the handler to run.
_LONGEST_WAIT_S = 0.2 if os.name == "nt" else None


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How one rank is started.

    Attributes:
        rank: its rank, for messages.
        command: program and arguments. Nothing secret: every user of the machine can read them.
        bootstrap: its first message on stdin; may be secret.
        log_path: where its stderr goes, appended.
        environment: added to this process's environment, of which it gets all but the token. Nothing secret.
    """

    rank: int
    command: Sequence[str]
    bootstrap: JsonObject
    log_path: Path
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank failed.

    Attributes:
        rank: which one.
        message: one or two lines for the user.
        exit_code: what the whole run should exit with.
        consequence: True when the rank only noticed that another one failed.
        lost: which one that was, if it knows.
        died: True when the process ended without a word.
    """

    rank: int
    message: str
    exit_code: int
    consequence: bool = False
    lost: int | None = None
    died: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: `failure` is the first cause, `failures` all in the order in which they were seen."""

    exit_code: int
    failure: Failure | None
    failures: tuple[Failure, ...]
    interrupted: bool
    killed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Elastic:
    """Ranks that a run can lose, all but rank 0.

    Attributes:
        min_ranks: with fewer living ones the run has failed.
        respawn: how a rank that has died is started again, rank 0 too; None: it is not.
    """

    min_ranks: int
    respawn: Callable[[int], ChildSpec] | None = None


@dataclass(frozen=True, slots=True)
class _Said:
    rank: int
    message: JsonObject


@dataclass(frozen=True, slots=True)
class _Ended:
    rank: int
    returncode: int


@dataclass(frozen=True, slots=True)
class _Interrupted:
    signum: int


@dataclass(frozen=True, slots=True)
class _Suspended:
    rank: int
    seconds: float


_Seen = _Said | _Ended | _Interrupted | _Suspended


class _Child:
    """One process, its two threads and its stdin."""

    def __init__(self, spec: ChildSpec, seen: SimpleQueue[_Seen]) -> None:
        self.rank = spec.rank
        self.log_path = spec.log_path
        self.ended = False
        self.killed = False
        self._seen = seen
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        with spec.log_path.open("ab") as log:
            self.log_offset = log.tell()
            self._process = subprocess.Popen(
                list(spec.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(spec),
                # A group of its own: the terminal's Ctrl-C reaches only this process, which then tells the children.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self.pid = self._process.pid
        self._state = psutil.Process(self.pid)
        self._stopped_at: float | None = None
        self._reader = threading.Thread(target=self._read, name=f"rank{self.rank}-stdout", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name=f"rank{self.rank}-wait", daemon=True)
        self._reader.start()
        self._waiter.start()
        self.tell(spec.bootstrap)

    def tell(self, message: JsonObject) -> None:
        """Write one line to the child. A child that is gone is reported by its waiter, not here."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            logger.debug("rank %d did not take a message", self.rank)

    def suspended_for(self, now: float) -> float:
        """Seconds for which the system has held it (SIGSTOP), counted from call to call."""
        is_stopped = False
        with contextlib.suppress(psutil.Error):
            is_stopped = self._state.status() == psutil.STATUS_STOPPED
        if not is_stopped or self._stopped_at is None:
            self._stopped_at = now if is_stopped else None
            return 0.0
        return now - self._stopped_at

    def kill(self) -> None:
        """End the process, and on POSIX all that it started, at once."""
        if self.ended:
            return
        self.killed = True
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self) -> None:
        """Release pipes and threads of a process that has ended."""
        # join before closing stdout: the reader may still sit in a read there
        self._waiter.join(timeout=5)
        self._reader.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                logger.warning("rank %d wrote a line that is not JSON", self.rank)
                continue
            if isinstance(message, dict):
                self._seen.put(_Said(self.rank, message))

    def _wait(self) -> None:
        returncode = self._process.wait()
        # What it said last comes first in the queue. The limit is for a grandchild that keeps stdout open.
        self._reader.join(timeout=1)
        self._seen.put(_Ended(self.rank, returncode))


class Supervisor:
    """Runs children to their end. Use once; the calling thread must be the main thread for Ctrl-C to be handled.

    Args:
        specs: the children, in rank order.
        on_message: called on the calling thread with (rank, message) for everything but errors.
        patience: seconds that a failed run gets to end by itself before what is left is killed.
        on_stop: called once, when the user first asks to stop.
        elastic: what the run does without; None: the first rank that fails ends it.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        on_message: Callable[[int, JsonObject], None],
        *,
        patience: float,
        on_stop: Callable[[], None] | None = None,
        elastic: Elastic | None = None,
    ) -> None:
        self._specs = specs
        self._on_message = on_message
        self._on_stop = on_stop
        self._patience = patience
        self._elastic = elastic
        self._excuses: dict[int, Failure] = {}  # what ranks said of their end, of which the run may not care
        self._own_deaths: Counter[int] = Counter()  # in a row, but for those by a signal
        self._is_done = False  # rank 0 has ended well
        self._is_over = False  # a worker has: the server has told it that the run is over
        self._seen: SimpleQueue[_Seen] = SimpleQueue()  # its put may be called from a signal handler
        self._children: list[_Child] = []
        self._failures: list[Failure] = []
        self._deadline: float | None = None
        self._look_at = 0.0
        self._interrupts = 0

    def tell(self, rank: int, message: JsonObject) -> None:
        """Send `message` to one child, if it lives."""
        for child in self._children:
            if child.rank == rank and not child.ended:
                child.tell(message)

    def run(self) -> Outcome:
        """Start all children and block until the last one has ended. No child is left when it returns or raises."""
        with self._signals():
            try:
                for spec in self._specs:
                    self._children.append(_Child(spec, self._seen))
                while any(not child.ended for child in self._children):
                    self._handle(self._next())
            finally:
                self._kill()
                for child in self._children:
                    child.close()
        return self._outcome()

    def _next(self) -> _Seen | None:
        """The next thing seen, or None at the deadline."""
        while True:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + self._patience / LOOKS_PER_PATIENCE
                if (suspended := self._find_suspended(now)) is not None:
                    return suspended
            left = None if self._deadline is None else max(0.0, self._deadline - now)
            waits = [wait for wait in (left, _LONGEST_WAIT_S, self._look_at - now) if wait is not None]
            try:
                return self._seen.get(timeout=min(waits))
            except Empty:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return None

    def _find_suspended(self, now: float) -> _Suspended | None:
        if self._elastic is not None:
            return None  # whoever waits for it goes on without it, and takes it back when it wakes up
        known = {failure.lost for failure in self._failures}
        for child in self._children:
            seconds = 0.0 if child.ended else child.suspended_for(now)
            if seconds > self._patience and child.rank not in known:
                return _Suspended(child.rank, seconds)
        return None

    def _handle(self, seen: _Seen | None) -> None:
        if seen is None:
            self._kill()
            self._deadline = None  # only the ends of the killed are still to come
        elif isinstance(seen, _Interrupted):
            self._interrupt(seen.signum)
        elif isinstance(seen, _Suspended):
            message = (
                f"rank {seen.rank} is lost: its process was suspended for {seen.seconds:.1f} s (cluster.patience is "
                f"{self._patience:g})"
            )
            self._fail(Failure(seen.rank, message, EXIT_FAILED, consequence=True, lost=seen.rank))
        elif isinstance(seen, _Said):
            if seen.message.get("event") == "error" and self._elastic is not None:
                self._excuses[seen.rank] = _reported(seen.rank, seen.message)  # its end decides
            elif seen.message.get("event") == "error":
                self._fail(_reported(seen.rank, seen.message))
            else:
                self._on_message(seen.rank, seen.message)
        else:
            self._end(seen)

    def _end(self, seen: _Ended) -> None:
        child = next(child for child in self._children if child.rank == seen.rank)
        child.ended = True
        logger.info("rank ended rank=%d returncode=%d", seen.rank, seen.returncode)
        if self._goes_on_without(child, seen.returncode):
            return
        stopped = self._interrupts > 0 and seen.returncode == EXIT_INTERRUPTED
        stopped |= bool(self._failures) and seen.returncode == EXIT_FAILED  # told to end before it had begun
        explained = any(failure.rank == seen.rank for failure in self._failures)
        if seen.returncode != 0 and not (stopped or explained or child.killed):
            died = Failure(seen.rank, _epitaph(child, seen.returncode), EXIT_FAILED, died=True)
            self._fail(self._excuses.get(seen.rank, died))
        lost = {failure.lost for failure in self._failures}
        if self._deadline is not None and all(child.ended or child.rank in lost for child in self._children):
            self._deadline = min(self._deadline, time.monotonic() + LOST_GRACE_S)

    def _goes_on_without(self, child: _Child, returncode: int) -> bool:
        """Whether a rank's end changes nothing for the others; starts it again if that is wanted."""
        elastic = self._elastic
        if elastic is None or child.killed or self._failures or self._interrupts:
            return False
        if returncode == 0 and child.rank == 0:
            self._is_done = True
            self._deadline = time.monotonic() + self._patience  # a suspended worker would never end
        self._is_over |= returncode == 0
        if returncode == 0 or self._is_done or (self._is_over and child.rank != 0):
            return True
        excuse = self._excuses.get(child.rank)
        self._own_deaths[child.rank] = 0 if returncode < 0 else self._own_deaths[child.rank] + 1
        may_mend = excuse is None or (excuse.exit_code == EXIT_FAILED and not excuse.consequence)
        if elastic.respawn is not None and may_mend and self._own_deaths[child.rank] < MAX_OWN_DEATHS:
            logger.warning("rank died, starting it again rank=%d returncode=%d", child.rank, returncode)
            self._excuses.pop(child.rank, None)
            child.close()
            self._children.append(_Child(elastic.respawn(child.rank), self._seen))
            self._children.remove(child)
            return True
        living = sum(not other.ended for other in self._children)
        return child.rank != 0 and living >= elastic.min_ranks

    def _fail(self, failure: Failure) -> None:
        known = self._cause()
        self._failures.append(failure)
        logger.error("rank failed rank=%d message=%s", failure.rank, failure.message)
        if self._interrupts or (known is not None and not known.consequence):
            return
        grace = CONSEQUENCE_GRACE_S if failure.consequence else self._patience
        deadline = time.monotonic() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        for child in self._children:
            if child.rank != failure.rank and not child.ended:
                child.tell({"command": "abort", "rank": failure.rank, "message": failure.message})

    def _interrupt(self, signum: int) -> None:
        self._interrupts += 1
        logger.info("asked to stop signal=%d times=%d", signum, self._interrupts)
        if self._interrupts > 1:
            self._kill()
            return
        deadline = time.monotonic() + STOP_GRACE_S
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        for child in self._children:
            child.tell({"command": "stop"})
        if self._on_stop is not None:
            self._on_stop()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()

    def _cause(self) -> Failure | None:
        """The first rank that failed of itself; where all only point at others, the first of these."""
        causes = [failure for failure in self._failures if not failure.consequence] or self._failures
        return causes[0] if causes else None

    def _outcome(self) -> Outcome:
        cause = self._cause()
        interrupted = self._interrupts > 0
        if interrupted:
            # Ranks that leave one after the other see each other go: that is no failure worth a word.
            cause = None if cause is None or cause.consequence else cause
            exit_code = EXIT_INTERRUPTED
        else:
            exit_code = 0 if cause is None else cause.exit_code
        killed = tuple(child.rank for child in self._children if child.killed)
        return Outcome(exit_code, cause, tuple(self._failures), interrupted, killed)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a closed terminal become entries of the queue while the children run."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum: int, frame: FrameType | None) -> None:
            self._seen.put(_Interrupted(signum))

        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        signums = [getattr(signal, name) for name in names if hasattr(signal, name)]
        previous = {signum: signal.signal(signum, note) for signum in signums}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _environment(spec: ChildSpec) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    return {**inherited, **(spec.environment or {})}


def _reported(rank: int, message: JsonObject) -> Failure:
    code, lost = message.get("exit_code"), message.get("lost")
    return Failure(
        rank=rank,
        message=str(message.get("message", "failed without a message")),
        exit_code=code if isinstance(code, int) and code != 0 else EXIT_FAILED,
        consequence=bool(message.get("consequence", False)),
        lost=lost if isinstance(lost, int) else None,
    )


def _epitaph(child: _Child, returncode: int) -> str:
    how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    last = _last_line(child.log_path, child.log_offset)
    return f"rank {child.rank} died ({how}){': ' + last if last else ''}. Its log: {child.log_path}"


def _last_line(path: Path, offset: int) -> str:
    """The last line of a program that died with a Python traceback; nothing for other logs."""
    with contextlib.suppress(OSError):
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(offset, end - 4096))
            text = log.read().decode("utf-8", "replace")
        if "Traceback (most recent call last)" in text:
            return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")
    return ""
