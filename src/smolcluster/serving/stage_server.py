"""A chain of stages: rank 0 has the engine and the first layers, the others the rest in order; see DESIGN section 7.

    rank 0        ids -> its layers -> x        sends x to rank 1
    rank 1        x -> its layers -> x          sends x to rank 2
    last rank     x -> its layers -> logits -> a token for each stream        sends the tokens to rank 0

Nobody answers what it is sent: a stage computes what comes, in the order in which it comes, and sends it on. So as many
micro-batches are under way as rank 0 begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from smolcluster.errors import ServingError, SmolError
from smolcluster.serving.executor import LayerDecoder, MicroBatch, NewTokens, sample
from smolcluster.serving.sampling import Sampler
from smolcluster.serving.wire import BatchMessage, pack_tokens, unpack_batch, unpack_tokens


class Ring(Protocol):
    """The stages in a ring: each sends to the next one, the last to rank 0. See collectives/direct.py."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send a message to the next rank."""
        ...

    def receive(self, meanwhile: Callable[[], object] = lambda: None, timeout: float = math.inf) -> memoryview:
        """The next message of the rank before; blocks.

        Args:
            meanwhile: called if there is time.
            timeout: seconds until somebody counts as lost if nothing comes.
        """
        ...

    def failure(self) -> SmolError | None:
        """Why a rank is gone, as far as is known."""
        ...

    def abort(self, error: SmolError) -> None:
        """End it on every rank."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class ChainExecutor:
    """The engine's side: rank 0."""

    def __init__(
        self, ring: Ring, decoder: LayerDecoder | None, *, slots: int, length: int, timeout: float = math.inf
    ) -> None:
        """Begin with empty slots.

        Args:
            ring: the stages in order, this one first; two or more ranks.
            decoder: the first layers; None: they are on rank 1, as this host has no layers.
            slots, length: that every stage has.
            timeout: seconds for a micro-batch; then a stage counts as lost that may only have stopped to compute.
        """
        self._ring = ring
        self._decoder = decoder
        self._newest: memoryview | None = None
        self._timeout = timeout
        self.slots, self.length = slots, length
        self.depth = ring.world_size - (decoder is None)

    def submit(self, batch: MicroBatch) -> None:
        """Compute the first layers, and let the next stage go on."""
        message, x = BatchMessage(batch, computes=self._decoder is not None), torch.tensor(batch.tokens)
        began = time.perf_counter()
        if self._decoder is not None:
            x = self._decoder(x, batch.segments).cpu()
        self._ring.send(message.parts(x, time.perf_counter() - began))

    def result(self) -> NewTokens:
        """Of the oldest micro-batch under way; blocks.

        Raises:
            PeerLost: a stage is gone.
        """
        message = self._ring.receive(self._reread, self._timeout)
        self._newest = message
        return replace(unpack_tokens(message), hops=self._ring.world_size)

    def _reread(self) -> None:
        """So that the next tokens find the processor's caches full of what it takes to read them."""
        if self._newest is not None:
            unpack_tokens(self._newest)

    def failure(self) -> SmolError | None:
        """Which stage is gone."""
        return self._ring.failure()

    def close(self) -> None:
        """Let the stages end, when nothing is under way."""
        self._ring.send([])
        self._ring.close()

    def abandon(self) -> None:
        """End the chain whatever is under way; the stages notice."""
        self._decoder = None  # its memory is for the next chain, even if somebody still has this one
        self._ring.abort(ServingError("the chain is over"))
        self._ring.close()


def run_stage(ring: Ring, decoder: LayerDecoder) -> None:
    """Any other rank's side: compute what comes until rank 0 closes the chain. Blocks.

    Raises:
        PeerLost: a stage is gone.
    """
    is_last = ring.rank == ring.world_size - 1
    samplers: dict[int, Sampler] = {}
    message: memoryview | None = None

    def reread() -> None:  # see ChainExecutor
        if message is not None:
            unpack_batch(message)

    while True:
        message = ring.receive(reread)
        if not len(message):
            if not is_last:
                ring.send([])
            return
        batch, x, seconds = unpack_batch(message)
        if not is_last:
            onward, began = BatchMessage(batch, seconds), time.perf_counter()
            x = decoder(x, batch.segments).cpu()
            ring.send(onward.parts(x, time.perf_counter() - began))
            continue
        began = time.perf_counter()
        logits = decoder(x, batch.segments, [row for _, row in batch.wanted])
        tokens = sample(samplers, batch.opened, [slot for slot, _ in batch.wanted], logits)
        ring.send(pack_tokens(NewTokens(batch.number, tokens, [*seconds, time.perf_counter() - began])))
