"""The engine: requests in, tokens out. One thread of its own; everything else may be called from any thread.

Each round it lets requests in that have waited for a slot, asks the scheduler what to compute, gives that to the
executor, and hands out what came back. A request's tokens are kept here, so that its keys and values can be computed
again wherever they are lost.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from smolcluster.errors import ServingError, SmolError
from smolcluster.models.decoder import Segment
from smolcluster.serving.executor import Executor, MicroBatch, NewTokens, Opened
from smolcluster.serving.sampling import Sampled, Sampling
from smolcluster.serving.scheduler import ChunkSize, Limits, StreamState, plan
from smolcluster.serving.slots import Slots
from smolcluster.serving.text import TextStream

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]
# How often an engine with nothing to do looks whether its stages are all there.
LOOK_SECONDS = 0.5
# How often one whose stages are gone looks whether there are others.
RETRY_SECONDS = 5.0
# How often a stream goes on with other stages without a new token in between.
MAX_RECOVERIES = 3
# Tokens of a piece of a prompt where every bit counts.
FIXED_CHUNK = 32
# Tokens of the prompt that are decoded with an answer's first one.
_CONTEXT_TOKENS = 4


class QueueFull(ServingError):
    """As many requests wait as may wait."""


class Unavailable(ServingError):
    """Nobody computes at the moment, or no more."""


class ContextOverflow(ServingError):
    """Prompt and answer have no room in the model's context."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks for.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: of the answer.
        sampling: how its tokens are chosen.
        stop_tokens: ids that end the answer, and are no part of it.
        stops: strings that do.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    stops: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Some more of an answer.

    Attributes:
        text: what follows, perhaps nothing yet.
        token: the newest one; None: only the text is new.
        finish_reason: why the answer ends here; None: it goes on.
        error: what went wrong, if that is why.
    """

    text: str
    token: Sampled | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(slots=True)
class _Stream:
    number: int
    request: Request
    on_event: Callable[[Event], None]
    text: TextStream
    tokens: list[int]
    submitted: float
    newest: float = 0.0
    slot: int = -1
    computed: int = 0
    is_busy: bool = False
    is_opened: bool = False
    is_cancelled: bool = False
    recoveries: int = 0

    @property
    def answer(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(slots=True)
class Counts:
    """What the engine has done so far, for metrics; read from any thread."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Observer:
    """Is told how long things take, in the engine's thread. This one does not care."""

    def first_token(self, seconds: float) -> None:
        """From a request to its first token."""

    def next_token(self, seconds: float) -> None:
        """From a token of an answer to the next one."""

    def ended(self, seconds: float) -> None:
        """From a request to its end."""


class Engine:
    """Serves requests with one model."""

    def __init__(
        self,
        executor: Executor,
        decode: Callable[[Sequence[int]], str],
        *,
        recover: Callable[[SmolError], Executor] | None = None,
        max_queue: int = 64,
        is_deterministic: bool = False,
        timeout: float = math.inf,
        observer: Observer | None = None,
    ) -> None:
        """Start the thread.

        Args:
            executor: computes; it is the engine's from now on.
            decode: the text of token ids.
            recover: makes an executor of the same size in place of one that has failed, whose error it is given. It
                may block. None: there is no other.
            max_queue: requests that may wait besides.
            is_deterministic: each answer is computed in pieces that do not depend on the other ones, and nothing of
                another conversation is used again. The executor has to be so too; see Decoder.
            timeout: seconds after which a request is given up.
            observer: is told how long things take.
        """
        self._observer = observer or Observer()
        self._fixed_chunk = FIXED_CHUNK if is_deterministic else None
        self._executor = executor
        self._decode = decode
        self._recover = recover
        self._max_queue = max_queue
        self._slots = Slots(executor.slots)
        self._waiting: deque[_Stream] = deque()
        self._streams: dict[int, _Stream] = {}  # by slot, in the order in which they came
        self._under_way: deque[MicroBatch] = deque()
        self._chunk = ChunkSize()
        self._batches = self._requests = 0
        self._news = threading.Condition()
        self._is_closing = False
        self.counts = Counts()
        self.failure: str | None = None
        self.recoveries = 0
        self._is_reconnecting = self._is_down = False
        self._timeout = timeout
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """Longest context, prompt and answer together."""
        return self._executor.length

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._streams)

    @property
    def usage(self) -> float:
        """Part of the slots that is in use."""
        return self._slots.used / (self._slots.used + self._slots.free)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Ask for an answer.

        Args:
            request: what is asked.
            on_event: called in the engine's thread with every piece, last with one that has a finish_reason. It must
                not block.

        Returns:
            The request's number, for `cancel`.

        Raises:
            ContextOverflow: there is no room for it.
            QueueFull: too many wait.
            Unavailable: nobody computes.
        """
        prompt, longest = len(request.prompt), self._executor.length
        if prompt + request.max_tokens > longest:
            raise ContextOverflow(
                f"the prompt has {prompt} tokens and the answer may have {request.max_tokens}, but the context has "
                f"{longest} in all. Shorten the prompt, or ask for fewer tokens"
            )
        context = request.prompt[-_CONTEXT_TOKENS:]
        text = TextStream(self._decode, context, request.stops)
        with self._news:
            if self._is_closing or self._is_down:
                raise Unavailable(self.failure or "the server is shutting down")
            if len(self._waiting) >= self._max_queue + self._slots.free:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already. Try again later")
            self._requests += 1
            stream = _Stream(self._requests, request, on_event, text, list(request.prompt), time.monotonic())
            self._waiting.append(stream)
            self._news.notify()
        return stream.number

    def cancel(self, number: int) -> None:
        """End a request; its last event says so. One that has ended already stays as it is."""
        with self._news:
            for stream in (*self._waiting, *self._streams.values()):
                if stream.number == number:
                    stream.is_cancelled = True
            self._news.notify()

    def reconnect(self) -> None:
        """Let the executor be made anew, as if it had failed; streams go on. Returns at once."""
        with self._news:
            self._is_reconnecting = self._recover is not None
            self._news.notify()

    def close(self) -> None:
        """Cancel everything and end the thread; blocks until then."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        while self._wait():
            try:
                self._admit()
                self._check()
                self._launch()
                if self._under_way:
                    self._collect()
            except SmolError as error:
                self._begin_again(error)
            except Exception:  # nobody may be left waiting, whatever it is
                logger.exception("a step has failed")
                self._end_all("the server has failed; see its log")
                self._begin_again(ServingError("a step has failed"))
        with self._news:
            self._is_closing = True
        self._end_all("the server is shutting down")

    def _check(self) -> None:
        if self._is_reconnecting or self._is_down:
            self._is_reconnecting = False
            raise ServingError("asked to reconnect")
        if (error := self._executor.failure()) is not None:
            raise error

    def _begin_again(self, error: SmolError) -> None:
        """With another executor, which knows nothing of the streams: their tokens are all here.

        Those of micro-batches under way were never handed out, so none is lost and none comes twice.
        """
        self._under_way.clear()
        self._chunk.restart()
        self._slots.forget()
        logger.warning("executor failed reason=%s", error)
        if self._recover is None:
            self._end_all(str(error))
            return
        self.failure = str(error)
        try:
            self._executor = self._recover(error)
        except SmolError as reason:
            logger.error("there is no other executor reason=%s", reason)
            self.failure = str(reason)
            self._is_down = True
            self._end_all(str(reason))
            return
        for stream in list(self._streams.values()):
            stream.computed, stream.is_busy, stream.is_opened = 0, False, False
            stream.recoveries += 1
            if stream.recoveries > MAX_RECOVERIES:  # what it asks for may be what the stages die of
                self._finish(stream, "error", error=f"its stages have failed {MAX_RECOVERIES} times without a token")
        self.recoveries += 1
        self.failure, self._is_down = None, False

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        with self._news:
            while not (self._is_closing or self._is_reconnecting or self._streams or self._waiting):
                self._news.wait(RETRY_SECONDS if self._is_down else LOOK_SECONDS)
                if self._is_down or self._executor.failure() is not None:
                    break
            return not self._is_closing

    def _admit(self) -> None:
        oldest = time.monotonic() - self._timeout
        for stream in [stream for stream in (*self._waiting, *self._streams.values()) if stream.submitted < oldest]:
            if not stream.is_busy:
                with self._news:
                    if stream in self._waiting:
                        self._waiting.remove(stream)
                self._finish(stream, "error", error=f"it was not done within {self._timeout:g} s (serving.timeout)")
        with self._news:
            for stream in [stream for stream in self._waiting if stream.is_cancelled]:
                self._waiting.remove(stream)
                self._finish(stream, "cancelled")
            while self._waiting and self._slots.free:
                stream = self._waiting.popleft()
                stream.slot, stream.computed = self._slots.acquire(stream.tokens)
                self._streams[stream.slot] = stream
                self.counts.prompt_tokens += len(stream.tokens)
                self.counts.reused_tokens += stream.computed
        for stream in list(self._streams.values()):
            if stream.is_cancelled and not stream.is_busy:
                self._finish(stream, "cancelled")

    def _launch(self) -> None:
        """Begin as many micro-batches as should be under way."""
        limits = Limits(self._executor.depth, self._chunk.tokens, fixed_chunk=self._fixed_chunk)
        while segments := plan(self._states(), len(self._under_way), limits):
            batch = self._batch(segments)
            self._under_way.append(batch)
            self._chunk.begin()
            self._executor.submit(batch)

    def _states(self) -> list[StreamState]:
        return [
            StreamState(slot, len(stream.tokens), stream.computed, stream.is_busy, len(stream.request.prompt))
            for slot, stream in self._streams.items()
            if not stream.is_cancelled
        ]

    def _batch(self, segments: Sequence[Segment]) -> MicroBatch:
        tokens: list[int] = []
        wanted: list[tuple[int, int]] = []
        opened: dict[int, Opened] = {}
        for slot, start, count in segments:
            stream = self._streams[slot]
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
        self._chunk.end(batch.segments)
        for slot, sampled in found.tokens.items():
            stream = self._streams[slot]
            stream.is_busy = False
            self._take(stream, sampled)

    def _take(self, stream: _Stream, sampled: Sampled) -> None:
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
            now = time.monotonic()
            if stream.newest:
                self._observer.next_token(now - stream.newest)
            else:
                self._observer.first_token(now - stream.submitted)
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
        stream: _Stream,
        reason: FinishReason,
        piece: str = "",
        sampled: Sampled | None = None,
        error: str | None = None,
    ) -> None:
        piece += stream.text.end()
        if self._streams.pop(stream.slot, None) is not None:
            # The newest token has not been computed.
            kept = stream.tokens[: stream.computed] if self._fixed_chunk is None else []
            self._slots.release(stream.slot, kept)
        self._observer.ended(time.monotonic() - stream.submitted)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        self._tell(stream, Event(piece, sampled, reason, error))

    def _tell(self, stream: _Stream, event: Event) -> None:
        try:
            stream.on_event(event)
        except Exception:  # whoever asked has a defect: the others go on
            logger.exception("a request's callback has failed")
            stream.is_cancelled = True

    def _end_all(self, error: str) -> None:
        with self._news:
            waiting = list(self._waiting)
            self._waiting.clear()
        for stream in (*self._streams.values(), *waiting):
            self._finish(stream, "error", error=error)
