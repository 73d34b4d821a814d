"""Which tokens the stages compute next: a pure function of what is known about the streams.

Continuous batching: a stream joins and leaves between any two steps. Streams that have begun to write come first, one
token each; then a piece of a prompt, no longer than the others can wait for (chunked prefill). With S stages there are
to be at least S micro-batches under way, so the streams that write are divided into as many groups.

Source    Yu et al. 2022, Orca (OSDI), section 3.1; Agrawal et al. 2024, Sarathi-Serve, arXiv:2403.02310, section 4
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from smolcluster.models.decoder import Segment


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream.

    Attributes:
        slot: its.
        known: tokens that it has: prompt and answer so far.
        computed: how many of them the stages have computed, or are computing.
        is_busy: a token of it is on its way, without which it cannot go on.
        prompt: how many of the known ones are the prompt's.
    """

    slot: int
    known: int
    computed: int
    is_busy: bool
    prompt: int = 0

    @property
    def writes(self) -> bool:
        """All but its newest token are computed: each step gives it another one."""
        return self.known - self.computed <= 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold.

    Attributes:
        depth: micro-batches that are to be under way at once: at least as many as stages.
        chunk: tokens of prompts in a step, while other streams write.
        whole_chunk: the same while none does.
        fixed_chunk: prompts are always cut at multiples of so many tokens, and what follows them is computed token by
            token, also when it is computed again: then every bit is the same again. None: as is fastest.
    """

    depth: int = 1
    chunk: int = 32
    whole_chunk: int = 256
    fixed_chunk: int | None = None


def plan(streams: Sequence[StreamState], under_way: int, limits: Limits, *, has_room: bool = True) -> list[Segment]:
    """The next micro-batch; empty: there is nothing to do now.

    Args:
        streams: in the order in which they came.
        under_way: micro-batches that have not come back.
        limits: what a step may hold.
        has_room: it may hold a piece of a prompt while others write. Not while another one does: at a time a large
            piece in one of several micro-batches, and not small ones in all of them.
    """
    if under_way >= limits.depth:
        return []
    writing = [stream for stream in streams if stream.writes]
    # As many in each group; not all that are free at the moment, or one group would swallow the others.
    group = -(-len(writing) // limits.depth)
    segments = [Segment(stream.slot, stream.computed, 1) for stream in writing if not stream.is_busy][:group]
    room = (limits.chunk if has_room else 0) if writing else limits.whole_chunk
    for stream in streams:
        if stream.writes or stream.is_busy or room <= 0:
            continue
        count = min(room, stream.known - stream.computed)
        if limits.fixed_chunk is not None:
            count = _fixed(stream, limits.fixed_chunk)
        segments.append(Segment(stream.slot, stream.computed, count))
        room -= count
    return segments


def _fixed(stream: StreamState, chunk: int) -> int:
    """Tokens of its next piece, whatever else there is to do."""
    if stream.computed >= stream.prompt:
        return 1
    return min(chunk - stream.computed % chunk, stream.prompt - stream.computed)


class ChunkSize:
    """How many tokens of a prompt a step may hold so that it takes less than twice as long for those who write.

    It is measured: what a step takes while no prompt is under way, and what each token of a prompt adds. If there are
    always prompts, steps without one are made from time to time, as the streams that write become more or fewer.
    """

    LEAST, MOST = 8, 256
    # Steps with a piece, until there has to be one without.
    UNMEASURED = 16
    # Of what a step takes otherwise, a piece may take so much in addition. Prompts that follow take a little more.
    SHARE = 0.85

    def __init__(self) -> None:
        self.tokens = 32
        self._under_way: deque[_Step] = deque()
        self._step = 0.0  # seconds of a step in which streams only write
        self._since = 0  # steps with a piece and with streams that write, since the last one of these
        # Of pieces of prompts: what they add in seconds, and their tokens. Apart, or short ones would count too much.
        self._seconds = self._tokens = 0.0

    def begin(self, segments: Sequence[Segment]) -> None:
        """A micro-batch begins."""
        step = _Step(time.perf_counter(), sum(segment.length for segment in segments if segment.length > 1))
        step.is_delayed = any(other.added for other in self._under_way)
        if step.added:
            for other in self._under_way:
                other.is_delayed = True
        self._under_way.append(step)

    @property
    def has_room(self) -> bool:
        """Whether the next micro-batch may hold a piece of a prompt while others write."""
        return self._since < self.UNMEASURED and not any(step.added for step in self._under_way)

    def restart(self) -> None:
        """Whatever is under way never ends."""
        self._under_way.clear()

    def end(self, segments: Sequence[Segment]) -> None:
        """The oldest one has ended."""
        step = self._under_way.popleft()
        seconds = time.perf_counter() - step.began
        if not step.added:
            if not step.is_delayed:
                new = 1.0 if not self._step else 0.5 if self._since else 0.2
                self._step, self._since = (1 - new) * self._step + new * seconds, 0
        elif any(segment.length == 1 for segment in segments):
            self._since += 1
            if self._step:
                self._learn(max(seconds - self._step, 0.0), step.added)
        else:
            self._learn(seconds, step.added)
        if self._step and self._seconds:
            tokens = self.SHARE * self._step * self._tokens / self._seconds
            self.tokens = max(self.LEAST, min(self.MOST, int(tokens)))

    def _learn(self, seconds: float, tokens: int) -> None:
        old = 0.8 if self._tokens else 0.0
        self._seconds = old * self._seconds + (1 - old) * seconds
        self._tokens = old * self._tokens + (1 - old) * tokens


@dataclass(slots=True)
class _Step:
    """A micro-batch under way.

    Attributes:
        began: when.
        added: tokens of prompts in it.
        is_delayed: a piece of a prompt was or is under way besides.
    """

    began: float
    added: int
    is_delayed: bool = False
