"""The engine: requests in, tokens out. A queue, and replicas of the model that take from it, each in its own thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from smolcluster.serving.executor import Executor
from smolcluster.serving.queue import StreamQueue
from smolcluster.serving.replica import Counts, Observer, Recover, Replica, Rules
from smolcluster.serving.requests import ContextOverflow, Event, Request, Stream
from smolcluster.serving.text import TextStream

# Tokens of a piece of a prompt where every bit counts.
FIXED_CHUNK = 32
# Tokens of the prompt that are decoded with an answer's first one.
_CONTEXT_TOKENS = 4


class Engine:
    """Serves requests with one model. Its methods may be called from any thread."""

    def __init__(
        self,
        executors: Sequence[tuple[Executor, Recover | None]],
        decode: Callable[[Sequence[int]], str],
        *,
        max_queue: int = 64,
        is_deterministic: bool = False,
        timeout: float = math.inf,
        observer: Observer | None = None,
    ) -> None:
        """Start the threads.

        Args:
            executors: one for each replica, and what makes another one in place of it; all have the same length.
            decode: the text of token ids.
            max_queue: requests that may wait besides.
            is_deterministic: each answer is computed in pieces that do not depend on the other ones, and nothing of
                another conversation is used again. The executors have to be so too; see Decoder.
            timeout: seconds after which a request is given up.
            observer: is told how long things take.
        """
        rules = Rules(FIXED_CHUNK if is_deterministic else None, timeout, observer or Observer())
        self._decode = decode
        self._queue = StreamQueue(max_queue)
        self.length = min(executor.length for executor, _ in executors)  # longest context, prompt and answer together
        self.replicas = [Replica(self._queue, executor, recover, rules) for executor, recover in executors]
        self._requests = 0
        for replica in self.replicas:
            replica.start()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(replica.load for replica in self.replicas)

    @property
    def usage(self) -> float:
        """Part of the slots that is in use."""
        used = sum(replica.slots.used for replica in self.replicas)
        return used / (used + sum(replica.slots.free for replica in self.replicas))

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._queue)

    @property
    def failure(self) -> str | None:
        """Why nobody computes; None: somebody does."""
        return self._queue.failure()

    @property
    def counts(self) -> Counts:
        """What all replicas have done so far."""
        total = Counts()
        for counts in (replica.counts for replica in self.replicas):
            total.prompt_tokens += counts.prompt_tokens
            total.reused_tokens += counts.reused_tokens
            total.answer_tokens += counts.answer_tokens
            total.recoveries += counts.recoveries
            for reason, number in list(counts.finished.items()):
                total.finished[reason] = total.finished.get(reason, 0) + number
        return total

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Ask for an answer.

        Args:
            request: what is asked.
            on_event: called in a replica's thread with every piece, last with one that has a finish_reason. It must
                not block.

        Returns:
            The request's number, for `cancel`.

        Raises:
            ContextOverflow: there is no room for it.
            QueueFull: too many wait.
            Unavailable: nobody computes.
        """
        prompt = len(request.prompt)
        if prompt + request.max_tokens > self.length:
            raise ContextOverflow(
                f"the prompt has {prompt} tokens and the answer may have {request.max_tokens}, but the context has "
                f"{self.length} in all. Shorten the prompt, or ask for fewer tokens"
            )
        text = TextStream(self._decode, request.prompt[-_CONTEXT_TOKENS:], request.stops)
        with self._queue.news:
            self._requests += 1
            stream = Stream(self._requests, request, on_event, text, list(request.prompt))
            self._queue.put(stream)
        return stream.number

    def cancel(self, number: int) -> None:
        """End a request; its last event says so. One that has ended already stays as it is."""
        with self._queue.news:  # it may be on its way from the queue to a replica
            self._queue.cancel(number)
            for replica in self.replicas:
                replica.cancel(number)

    def reconnect(self) -> None:
        """Let the executors be made anew, as if they had failed; streams go on. Returns at once."""
        for replica in self.replicas:
            replica.reconnect()

    def close(self) -> None:
        """Cancel everything and end the threads; blocks until then."""
        with self._queue.news:
            self._queue.is_closing = True
            self._queue.news.notify_all()
        for replica in self.replicas:
            replica.join()
