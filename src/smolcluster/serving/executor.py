"""What computes a micro-batch: all layers in this process, or stages on other machines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from smolcluster.errors import SmolError
from smolcluster.models.decoder import Segment
from smolcluster.serving.sampling import Sampled, Sampler, Sampling


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence takes a slot.

    Attributes:
        sampling: how its tokens are chosen.
        context: its tokens so far: prompt, and answer if it goes on.
        drawn: how many of these are the answer's.
    """

    sampling: Sampling
    context: tuple[int, ...]
    drawn: int = 0

    @property
    def needs_context(self) -> bool:
        """Whether the context's tokens matter to how the next one is chosen."""
        return self.sampling.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of several sequences, computed together.

    Attributes:
        number: counts up.
        segments: whose rows, in order.
        tokens: ids of the rows.
        wanted: slots that get a new token, with the row that it follows.
        opened: sequences that take a slot with this micro-batch.
    """

    number: int
    segments: Sequence[Segment]
    tokens: Sequence[int]
    wanted: Sequence[tuple[int, int]]
    opened: Mapping[int, Opened] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What came of a micro-batch.

    Attributes:
        number: the micro-batch's.
        tokens: one for each slot that wanted one.
        seconds: that each stage has computed for it, in order; the rest was spent between them.
        hops: messages that this took, from stage to stage and back.
    """

    number: int
    tokens: Mapping[int, Sampled]
    seconds: Sequence[float] = ()
    hops: int = 0


class LayerDecoder(Protocol):
    """Consecutive layers of a model, with the keys and values of sequences in slots: models/decoder.py or another."""

    @property
    def slots(self) -> int:
        """Sequences that are kept at once, in slots 0 to slots - 1."""
        ...

    @property
    def length(self) -> int:
        """Positions that a slot has."""
        ...

    def __call__(self, x: torch.Tensor, segments: Sequence[Segment], wanted: Sequence[int] = ()) -> torch.Tensor:
        """Run the layers over rows of several sequences; see decoder.Decoder."""
        ...


class Executor(Protocol):
    """Computes micro-batches in the order in which they are given. One thread calls it."""

    @property
    def slots(self) -> int:
        """Sequences that are kept at once, in slots 0 to slots - 1."""
        ...

    @property
    def length(self) -> int:
        """Positions that a slot has."""
        ...

    @property
    def depth(self) -> int:
        """Micro-batches that should be under way at once."""
        ...

    def submit(self, batch: MicroBatch) -> None:
        """Begin a micro-batch."""
        ...

    def result(self) -> NewTokens:
        """What came of the oldest one that is under way; blocks."""
        ...

    def failure(self) -> SmolError | None:
        """Why it can compute no more, as far as is known."""
        ...

    def abandon(self) -> None:
        """End it whatever is under way, from any thread; who waits for a result gets an error."""
        ...


class LocalExecutor:
    """All layers in this process."""

    depth = 1

    def __init__(self, decoder: LayerDecoder) -> None:
        """Take a decoder with all layers."""
        self._decoder = decoder
        self.slots, self.length = decoder.slots, decoder.length
        self._samplers: dict[int, Sampler] = {}
        self._done: deque[NewTokens] = deque()

    def submit(self, batch: MicroBatch) -> None:
        """Compute it."""
        began = time.perf_counter()
        logits = self._decoder(torch.tensor(batch.tokens), batch.segments, [row for _, row in batch.wanted])
        tokens = sample(self._samplers, batch.opened, [slot for slot, _ in batch.wanted], logits)
        self._done.append(NewTokens(batch.number, tokens, (time.perf_counter() - began,)))

    def result(self) -> NewTokens:
        """What came of it."""
        return self._done.popleft()

    def failure(self) -> SmolError | None:
        """Nothing that can be lost."""
        return None

    def abandon(self) -> None:
        """Nobody waits for others."""


def sample(
    samplers: dict[int, Sampler], opened: Mapping[int, Opened], slots: Sequence[int], logits: torch.Tensor
) -> dict[int, Sampled]:
    """A token for each of `slots`, from logits (len(slots), V); `samplers` by slot are begun where one is opened."""
    for slot, sequence in opened.items():
        samplers[slot] = Sampler(sequence.sampling, sequence.context, sequence.drawn)
    logits = logits.cpu()
    return {slot: samplers[slot](row) for slot, row in zip(slots, logits, strict=True)}
