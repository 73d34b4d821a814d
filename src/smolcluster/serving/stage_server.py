"""A chain of stages: rank 0 has the engine and the first layers, the others the rest in order; see DESIGN section 7.

    rank 0        ids -> its layers -> x        sends x to rank 1
    rank 1        x -> its layers -> x          sends x to rank 2
    last rank     x -> its layers -> logits -> a token for each stream        sends the tokens to rank 0

Nobody answers what it is sent: a stage computes what comes, in the order in which it comes, and sends it on. So as many
micro-batches are under way as rank 0 begins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from smolcluster.collectives.base import Communicator
from smolcluster.errors import ServingError, SmolError
from smolcluster.models.decoder import Decoder
from smolcluster.serving.executor import MicroBatch, NewTokens, sample
from smolcluster.serving.sampling import Sampler
from smolcluster.serving.wire import pack_batch, pack_tokens, unpack_batch, unpack_tokens

_ROWS, _TOKENS, _END = 1, 2, 3


class ChainExecutor:
    """The engine's side: rank 0."""

    def __init__(
        self,
        comm: Communicator,
        decoder: Decoder | None,
        *,
        slots: int,
        length: int,
        failure: Callable[[], SmolError | None] = lambda: None,
    ) -> None:
        """Begin with empty slots.

        Args:
            comm: the stages in order, this one first; two or more ranks.
            decoder: the first layers; None: they are on rank 1, as this host has no layers.
            slots, length: that every stage has.
            failure: why a stage is gone, as far as is known.
        """
        self._comm = comm
        self._decoder = decoder
        self.slots, self.length = slots, length
        self.depth = comm.world_size - (decoder is None)
        self._last = comm.world_size - 1
        self._failure = failure

    def submit(self, batch: MicroBatch) -> None:
        """Compute the first layers, and let the next stage go on."""
        x = torch.tensor(batch.tokens)
        if self._decoder is not None:
            x = self._decoder(x, batch.segments).cpu()
        self._comm.send(pack_batch(batch, x), 1, _ROWS)

    def result(self) -> NewTokens:
        """Of the oldest micro-batch under way; blocks.

        Raises:
            PeerLost: a stage is gone.
        """
        [message] = self._comm.recv(self._last, _TOKENS).result()
        return unpack_tokens(message)

    def failure(self) -> SmolError | None:
        """Which stage is gone."""
        return self._failure()

    def close(self) -> None:
        """Let the stages end, when nothing is under way."""
        self._comm.send(torch.empty(0, dtype=torch.uint8), 1, _ROWS).wait()
        self._comm.close()

    def abandon(self) -> None:
        """End the chain whatever is under way; the stages notice."""
        self._comm.abort(ServingError("the chain is over"))
        self._comm.close()


def run_stage(comm: Communicator, decoder: Decoder) -> None:
    """Any other rank's side: compute what comes until rank 0 closes the chain. Blocks.

    Raises:
        PeerLost: a stage is gone.
    """
    rank, last = comm.rank, comm.world_size - 1
    samplers: dict[int, Sampler] = {}
    while True:
        # Not asked for before it is needed: whoever waits receives by itself, and no other thread is woken.
        [message] = comm.recv(rank - 1, _ROWS).result()
        if not message.numel():
            if rank < last:
                comm.send(message, rank + 1, _ROWS).wait()
            return
        batch, x = unpack_batch(message)
        if rank < last:
            comm.send(pack_batch(batch, decoder(x, batch.segments).cpu()), rank + 1, _ROWS)
            continue
        logits = decoder(x, batch.segments, [row for _, row in batch.wanted])
        tokens = sample(samplers, batch.opened, [slot for slot, _ in batch.wanted], logits)
        comm.send(pack_tokens(NewTokens(batch.number, tokens)), 0, _TOKENS)
