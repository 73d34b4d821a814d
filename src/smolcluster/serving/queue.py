"""One queue in front of all replicas of a model: who waits, and which replica takes whom."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from smolcluster.serving.requests import QueueFull, Stream, Unavailable

# After so long a stream that waits is taken by whoever has a free slot: the one meant for it may be in a long step, or
# dead and not known to be.
HANDOVER_SECONDS = 0.05


class Desk(Protocol):
    """A replica, as the queue sees it. The queue's lock is held when it is asked."""

    @property
    def free(self) -> int:
        """Slots that are free."""
        ...

    @property
    def load(self) -> int:
        """Streams that it has."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it does not compute at the moment."""
        ...

    @property
    def is_down(self) -> bool:
        """It does not compute, and is not about to."""
        ...

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many of a sequence's first tokens it has computed already."""
        ...


class StreamQueue:
    """Streams that wait for a slot, oldest first. `news` guards it and all that replicas have.

    Attributes:
        news: something has changed.
        is_closing: the replicas are to end.
    """

    def __init__(self, room: int) -> None:
        """Begin empty; `room`: streams that may wait besides those that free slots are waiting for."""
        self.news = threading.Condition()
        self.is_closing = False
        self.desks: list[Desk] = []
        self._room = room
        self._waiting: deque[Stream] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, stream: Stream) -> None:
        """Let a stream wait.

        Raises:
            QueueFull: too many do.
            Unavailable: nobody computes.
        """
        with self.news:
            if self.is_closing:
                raise Unavailable("the server is shutting down")
            if all(desk.is_down for desk in self.desks):
                raise Unavailable(self.failure() or "nobody computes")
            if len(self._waiting) >= self._room + sum(desk.free for desk in self.desks if desk.failure is None):
                raise QueueFull(f"{len(self._waiting)} requests are waiting already. Try again later")
            self._waiting.append(stream)
            self.news.notify_all()

    def put_back(self, streams: Sequence[Stream]) -> None:
        """Let streams wait that another replica has to go on with: before all others."""
        with self.news:
            for stream in streams:
                stream.queued = time.monotonic()
            self._waiting.extendleft(reversed(streams))
            self.news.notify_all()

    def is_for(self, desk: Desk) -> bool:
        """Whether the oldest stream is for this replica: that has computed its beginning, or has least to do."""
        with self.news:
            if not self._waiting or not desk.free or desk.failure is not None:
                return False
            oldest = self._waiting[0]
            if time.monotonic() >= oldest.queued + HANDOVER_SECONDS:
                return True
            able = [each for each in self.desks if each.free and each.failure is None]
            return desk is max(able, key=lambda each: (each.reusable(oldest.tokens), -each.load))

    def take(self, desk: Desk) -> Stream | None:
        """The oldest stream, if it is for this replica."""
        with self.news:
            return self._waiting.popleft() if self.is_for(desk) else None

    def take_ended(self, oldest: float) -> list[tuple[Stream, bool]]:
        """Streams that wait and need not any more: (it, whether it was submitted before `oldest` and not cancelled)."""
        with self.news:
            ended = [each for each in self._waiting if each.is_cancelled or each.submitted < oldest]
            for stream in ended:
                self._waiting.remove(stream)
            return [(stream, not stream.is_cancelled) for stream in ended]

    def take_all(self) -> list[Stream]:
        """Everybody who waits."""
        with self.news:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def cancel(self, number: int) -> None:
        """Nobody wants this stream any more, if it waits."""
        with self.news:
            for stream in self._waiting:
                if stream.number == number:
                    stream.is_cancelled = True
            self.news.notify_all()

    def has_others(self, desk: Desk) -> bool:
        """Whether another replica computes."""
        with self.news:
            return any(each.failure is None for each in self.desks if each is not desk)

    def has_hope(self, desk: Desk) -> bool:
        """Whether another replica computes, or is about to."""
        with self.news:
            return any(not each.is_down for each in self.desks if each is not desk)

    def failure(self) -> str | None:
        """Why no replica computes; None: one does."""
        with self.news:
            reasons = [desk.failure for desk in self.desks]
            return next((reason for reason in reasons if reason), None) if all(reasons) else None
