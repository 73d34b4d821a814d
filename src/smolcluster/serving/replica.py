"""One replica of a model: an executor, and the thread that decides what it computes next.

Each round it takes streams from the queue while it has slots, asks the scheduler what to compute, gives that to the
executor, and hands out what came back. A stream's tokens are kept, so that its keys and values can be computed again
wherever they are lost: with another executor, or by another replica.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from smolcluster.errors import ServingError, SmolError
from smolcluster.models.decoder import Segment
from smolcluster.serving.executor import Executor, MicroBatch, NewTokens, Opened
from smolcluster.serving.queue import HANDOVER_SECONDS, StreamQueue
from smolcluster.serving.requests import Event, FinishReason, Stream
from smolcluster.serving.sampling import Sampled
from smolcluster.serving.scheduler import ChunkSize, Limits, StreamState, plan
from smolcluster.serving.slots import Slots

logger = logging.getLogger(__name__)

# How often a replica with nothing to do looks whether its stages are all there.
LOOK_SECONDS = 0.5
# How often one whose stages are gone looks whether there are others.
RETRY_SECONDS = 5.0
# For what is under way when the engine ends.
CLOSE_SECONDS = 5.0
# How often a stream goes on with other stages without a new token in between.
MAX_RECOVERIES = 3

_FAILED = "the server has failed; see its log"
# Makes an executor of the same size in place of one that has failed, whose error it is given. It may block.
Recover = Callable[[SmolError], Executor]


@dataclass(slots=True)
class Counts:
    """What a replica has done so far, for metrics; read from any thread."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    recoveries: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Observer:
    """Is told how long things take, in the replicas' threads. This one does not care."""

    def first_token(self, seconds: float) -> None:
        """From a request to its first token."""

    def next_token(self, seconds: float) -> None:
        """From a token of an answer to the next one."""

    def ended(self, seconds: float) -> None:
        """From a request to its end."""

    def computed(self, stage: int, seconds: float) -> None:
        """A stage has computed a micro-batch."""

    def hopped(self, seconds: float) -> None:
        """From a stage to the next one, or back: packing, sending, waking up; of those of one micro-batch the mean."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What all replicas of an engine have in common.

    Attributes:
        fixed_chunk: see scheduler.Limits.
        timeout: seconds after which a request is given up.
        observer: is told how long things take.
    """

    fixed_chunk: int | None
    timeout: float
    observer: Observer


class Replica:
    """Serves streams of a queue with one executor."""

    def __init__(self, queue: StreamQueue, executor: Executor, recover: Recover | None, rules: Rules) -> None:
        """Start the thread.

        Args:
            queue: where streams come from, and go back to when this replica fails while others do not.
            executor: computes; it is the replica's from now on.
            recover: see Recover; None: there is no other.
            rules: of the engine.
        """
        self._queue, self._executor, self._recover, self._rules = queue, executor, recover, rules
        self.length = executor.length
        self.slots = Slots(executor.slots)
        self.streams: dict[int, Stream] = {}  # by slot, in the order in which they came
        self.counts = Counts()
        self.failure: str | None = None
        self.is_down = False
        self._under_way: deque[MicroBatch] = deque()
        self._chunk = ChunkSize()
        self._batches = 0
        self._is_reconnecting = self._is_alone = False
        self._began = 0.0  # the newest micro-batch; _is_alone: no other was under way then
        with queue.news:
            queue.desks.append(self)
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)

    @property
    def free(self) -> int:
        """See Desk."""
        return self.slots.free

    @property
    def load(self) -> int:
        """See Desk."""
        return len(self.streams)

    def reusable(self, tokens: Sequence[int]) -> int:
        """See Desk."""
        return self.slots.reusable(tokens)

    def start(self) -> None:
        """Begin, when all replicas of the queue are known to it."""
        self._thread.start()

    def cancel(self, number: int) -> None:
        """Nobody wants this stream any more, if it is here."""
        with self._queue.news:
            for stream in self.streams.values():
                if stream.number == number:
                    stream.is_cancelled = True
            self._queue.news.notify_all()

    def reconnect(self) -> None:
        """Let the executor be made anew, as if it had failed; streams go on. Returns at once."""
        with self._queue.news:
            self._is_reconnecting = self._recover is not None
            self._queue.news.notify_all()

    def join(self) -> None:
        """Wait for the thread's end; who does not answer meanwhile is not waited for."""
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._executor.abandon()
            self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._step()
                except SmolError as error:
                    self._begin_again(error)
                except Exception:  # nobody may be left waiting, whatever it is
                    logger.exception("a step has failed")
                    self._end_all(_FAILED)
                    self._begin_again(ServingError("a step has failed"))
        except Exception:
            logger.exception("a replica has failed")
            with self._queue.news:
                self.failure, self.is_down = _FAILED, True
        self._end_all("the server is shutting down" if self._queue.is_closing else _FAILED)
        if self._queue.is_closing or not self._queue.has_hope(self):
            self._end_waiting("the server is shutting down" if self._queue.is_closing else _FAILED)

    def _step(self) -> None:
        self._end_old()
        self._check()
        self._admit()
        self._launch()
        if self._under_way:
            self._collect()

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        queue = self._queue
        with queue.news:
            if not (queue.is_closing or self._is_reconnecting or self.streams or queue.is_for(self)):
                idle = HANDOVER_SECONDS if len(queue) else LOOK_SECONDS
                queue.news.wait(RETRY_SECONDS if self.is_down else idle)
            return not queue.is_closing

    def _check(self) -> None:
        if self._is_reconnecting or self.is_down:
            self._is_reconnecting = False
            raise ServingError(self.failure or "asked to reconnect")
        if (error := self._executor.failure()) is not None:
            raise error

    def _begin_again(self, error: SmolError) -> None:
        """With another executor, which knows nothing of the streams: their tokens are all here.

        Those of micro-batches under way were never handed out, so none is lost and none comes twice.
        """
        with self._queue.news:
            self.failure = str(error)
            self._under_way.clear()
            self._chunk.restart()
            self.slots.forget()
            streams = list(self.streams.values())
        logger.warning("executor failed reason=%s", error)
        for stream in streams:
            stream.forget()
            if stream.recoveries > MAX_RECOVERIES:  # what it asks for may be what the stages die of
                self._finish(stream, "error", error=f"its stages have failed {MAX_RECOVERIES} times without a token")
        if self._queue.has_others(self):
            self._give_back()
        try:
            if self._recover is None:
                raise error
            executor = self._recover(error)
        except SmolError as reason:
            self._give_up(reason)
            return
        except Exception as exc:  # such as too little memory for more layers
            logger.exception("no other executor could be made")
            self._give_up(ServingError(f"its layers could not be spread anew ({type(exc).__name__}); see the log"))
            return
        with self._queue.news:
            self._executor = executor
            self.failure, self.is_down = None, False
            self._queue.news.notify_all()
        self.counts.recoveries += 1

    def _give_back(self) -> None:
        """Let the other replicas go on with the streams of this one."""
        with self._queue.news:
            streams = list(self.streams.values())
            for stream in streams:
                self.slots.release(stream.slot, [])
            self.streams.clear()
            self._queue.put_back(streams)

    def _give_up(self, reason: SmolError) -> None:
        """There is no other executor. If this one can still compute, it goes on with those who wait."""
        with self._queue.news:
            self.is_down = self._recover is not None or self._executor.failure() is not None
            self.failure = str(reason) if self.is_down else None
        if self.is_down:
            logger.error("there is no other executor reason=%s", reason)
        if self._queue.has_hope(self):
            self._give_back()
            return
        self._end_all(str(reason))
        if self.is_down:
            self._end_waiting(str(reason))

    def _end_old(self) -> None:
        oldest = time.monotonic() - self._rules.timeout
        late = f"it was not done within {self._rules.timeout:g} s (serving.timeout)"
        for stream, is_late in self._queue.take_ended(oldest):
            self._finish(stream, "error" if is_late else "cancelled", error=late if is_late else None)
        for stream in [stream for stream in self.streams.values() if not stream.is_busy]:
            if stream.is_cancelled:
                self._finish(stream, "cancelled")
            elif stream.submitted < oldest:
                self._finish(stream, "error", error=late)

    def _admit(self) -> None:
        with self._queue.news:  # or a stream could not be cancelled while it is neither here nor there
            while (stream := self._queue.take(self)) is not None:
                stream.slot, stream.computed = self.slots.acquire(stream.tokens)
                self.streams[stream.slot] = stream
                self.counts.prompt_tokens += len(stream.tokens)
                self.counts.reused_tokens += stream.computed

    def _launch(self) -> None:
        """Begin as many micro-batches as should be under way."""
        limits = Limits(self._executor.depth, self._chunk.tokens, fixed_chunk=self._rules.fixed_chunk)
        while segments := plan(self._states(), len(self._under_way), limits, has_room=self._chunk.has_room):
            batch = self._batch(segments)
            self._is_alone = not self._under_way
            self._began = time.perf_counter()
            self._under_way.append(batch)
            self._chunk.begin(segments)
            self._executor.submit(batch)

    def _states(self) -> list[StreamState]:
        return [
            StreamState(slot, len(stream.tokens), stream.computed, stream.is_busy, len(stream.request.prompt))
            for slot, stream in self.streams.items()
            if not stream.is_cancelled
        ]

    def _batch(self, segments: Sequence[Segment]) -> MicroBatch:
        tokens: list[int] = []
        wanted: list[tuple[int, int]] = []
        opened: dict[int, Opened] = {}
        for slot, start, count in segments:
            stream = self.streams[slot]
            tokens += stream.tokens[start : start + count]
            stream.computed = start + count
            stream.is_busy = stream.computed == len(stream.tokens)
            if stream.is_busy:
                wanted.append((slot, len(tokens) - 1))
            if not stream.is_opened:
                stream.is_opened = True
                opened[slot] = Opened(stream.request.sampling, tuple(stream.tokens), stream.answer)
        self._batches += 1
        return MicroBatch(self._batches, segments, tokens, wanted, opened)

    def _collect(self) -> None:
        found: NewTokens = self._executor.result()
        batch = self._under_way.popleft()
        if found.number != batch.number or found.tokens.keys() != {slot for slot, _ in batch.wanted}:
            raise ServingError(f"a stage answered micro-batch {batch.number} with what was not asked for")
        self._chunk.end(batch.segments)
        self._note(found)
        for slot, sampled in found.tokens.items():
            stream = self.streams[slot]
            stream.is_busy = False
            try:
                self._take(stream, sampled)
            except Exception:  # a text that cannot be decoded: the others go on
                logger.exception("a token could not be told")
                self._finish(stream, "error", error=_FAILED)

    def _note(self, found: NewTokens) -> None:
        observer = self._rules.observer
        for stage, seconds in enumerate(found.seconds):
            observer.computed(stage, seconds)
        if found.hops and self._is_alone:  # else some of the time it waited for others to be computed
            observer.hopped(max(0.0, time.perf_counter() - self._began - sum(found.seconds)) / found.hops)

    def _take(self, stream: Stream, sampled: Sampled) -> None:
        """A new token of a stream."""
        stream.recoveries = 0
        if stream.is_cancelled:
            self._finish(stream, "cancelled")
        elif sampled.failure is not None:
            self._finish(stream, "error", error=sampled.failure)
        elif sampled.token in stream.request.stop_tokens:
            self._finish(stream, "stop")
        else:
            stream.tokens.append(sampled.token)
            now, observer = time.monotonic(), self._rules.observer
            if stream.newest:
                observer.next_token(now - stream.newest)
            else:
                observer.first_token(now - stream.submitted)
            stream.newest = now
            self.counts.answer_tokens += 1
            piece = stream.text.push(sampled.token)
            if stream.text.is_stopped:
                self._finish(stream, "stop", piece, sampled)
            elif stream.answer >= stream.request.max_tokens:
                self._finish(stream, "length", piece, sampled)
            else:
                self._tell(stream, Event(piece, sampled))

    def _finish(
        self,
        stream: Stream,
        reason: FinishReason,
        piece: str = "",
        sampled: Sampled | None = None,
        error: str | None = None,
    ) -> None:
        try:
            piece += stream.text.end()
        except Exception:
            logger.exception("an answer's end could not be decoded")
        with self._queue.news:
            if self.streams.get(stream.slot) is stream:
                del self.streams[stream.slot]
                # The newest token has not been computed.
                kept = stream.tokens[: stream.computed] if self._rules.fixed_chunk is None else []
                self.slots.release(stream.slot, kept)
                if len(self._queue):
                    self._queue.news.notify_all()
        self._rules.observer.ended(time.monotonic() - stream.submitted)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        self._tell(stream, Event(piece, sampled, reason, error))

    def _tell(self, stream: Stream, event: Event) -> None:
        try:
            stream.on_event(event)
        except Exception:  # whoever asked has a defect: the others go on
            logger.exception("a request's callback has failed")
            stream.is_cancelled = True

    def _end_all(self, error: str) -> None:
        for stream in list(self.streams.values()):
            self._finish(stream, "error", error=error)

    def _end_waiting(self, error: str) -> None:
        for stream in self._queue.take_all():
            self._finish(stream, "error", error=error)
