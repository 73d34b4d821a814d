"""What the ranks of a model that is divided by layers agree on in a step: loss, counts, the gradient's norm.

They go from neighbour to neighbour (collectives/chain.py). A head that is tied to the embedding lies on the first and
on the last rank. Each computes a part of its gradient; both step on the sum, so the copies stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.chain import ChainSum, EndsSum
from smolcluster.training.own_stages import OwnStages
from smolcluster.training.step import squares_of


@dataclass(frozen=True, slots=True)
class StageSums:
    """What all ranks contributed to a step besides gradients, the same bits on every rank.

    Attributes:
        loss_sum: over all targets.
        count: targets computed.
        samples: samples computed.
        planned: targets that the gradient is scaled by.
        nonfinite: 1 if the loss was not finite.
        stop_votes: ranks that asked to stop.
        squares: of each parameter's gradient, the square of its norm.
    """

    loss_sum: float
    count: int
    samples: int
    planned: int
    nonfinite: int
    stop_votes: int
    squares: list[float]


class StageAgreement:
    """On a step's sums, under way: first the gradients of tied parameters are summed, then all else is known."""

    def __init__(
        self,
        comm: Communicator,
        stages: OwnStages,
        grads: dict[str, Tensor | None],
        tied: Sequence[str],
        fields: list[float],
        votes: bool,
        tag: int,
    ) -> None:
        """Begin, and wait for nothing.

        Args:
            comm: the ranks, in the order of the layers.
            stages: this rank's.
            grads: of its parameters that are trained; those of tied ones become the sums.
            tied: names of parameters whose gradients the first and the last rank are to add up.
            fields: loss sum, targets, samples, planned targets, and 1 if the loss was not finite: zeros where the last
                rank brings them in.
            votes: whether this rank asks to stop.
            tag: of the sums; those of tied parameters are the ones after it.
        """
        self._comm = comm
        self._tag = tag
        self._stages = stages
        self._grads = grads
        self._fields = [*fields, float(votes)]
        self._ties: list[EndsSum] = []
        for number, name in enumerate(tied):
            grad: Tensor | None = None
            if name in stages.params:
                grad = grads[name]
                grad = torch.zeros_like(stages.params[name]) if grad is None else grad.contiguous()
                grads[name] = grad
            self._ties.append(EndsSum(comm, grad, tag + 1 + number))
        self._total = torch.empty(0)
        self._sum: ChainSum | None = None
        self.poll()

    def poll(self) -> None:
        """Pass on what has arrived; never blocks."""
        if self._sum is not None:
            self._sum.poll()
            return
        open_ties = [tie for tie in self._ties if not tie.poll()]
        if not open_ties:
            self._add_up()

    def wait(self) -> None:
        """Block until all ranks have contributed."""
        if self._sum is None:
            self._add_up()
        assert self._sum is not None
        self._sum.wait()

    def sums(self) -> StageSums:
        """What all ranks contributed; after `wait`."""
        loss_sum, count, samples, planned, nonfinite, votes, *squares = self._total.tolist()
        return StageSums(
            loss_sum, round(count), round(samples), round(planned), round(nonfinite), round(votes), squares
        )

    def _add_up(self) -> None:
        for tie in self._ties:
            tie.wait()
        squares = dict.fromkeys(self._stages.names, 0.0)
        own = {name: grad for name, grad in self._grads.items() if grad is not None and self._stages.answers_for(name)}
        squares |= zip(own, squares_of(list(own.values())), strict=True)
        self._total = torch.tensor([*self._fields, *squares.values()], dtype=torch.float64)
        self._sum = ChainSum(self._comm, self._total, self._tag)
