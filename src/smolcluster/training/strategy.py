"""What every algorithm offers to the one training loop (trainer.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from smolcluster.checkpoint.state import Shard, StateReader
from smolcluster.data.batch import Batch
from smolcluster.training.step import EvalSums, StepResult


class Strategy(Protocol):
    """One algorithm on one rank. It owns its whole `train_step`, so that an algorithm reads in one place."""

    @property
    def model(self) -> nn.Module:
        """What is trained; where ranks hold parts (DividesModel), with those parameters that this rank has."""
        ...

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """Compute the gradient of one step and apply the one that is due.

        Returns:
            The result of the step whose gradient was applied: this one with staleness_bound 0, the one
            staleness_bound steps earlier otherwise; None in the first staleness_bound steps.
        """
        ...

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch on this rank; changes nothing."""
        ...

    def finish(self) -> list[StepResult]:
        """Apply what is still pending, in order; their results, oldest first."""
        ...

    def request_stop(self) -> None:
        """Ask all ranks to stop; from any thread. A later StepResult says stop=True, on every rank at the same step."""
        ...

    def state(self) -> Mapping[str, Shard]:
        """All that the next step depends on, as far as this rank is to store it: what all hold alike is rank 0's part.

        Shares memory with the strategy: store it before the next step. Blocks until pending gradients are reduced;
        every rank calls it at the same step.
        """
        ...

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint, made by any number of ranks. Before the first step, on every rank.

        Raises:
            CheckpointError: it is of another model.
        """
        ...


@runtime_checkable
class DividesModel(Protocol):
    """A strategy whose ranks hold parts of what others hold whole."""

    @property
    def model(self) -> nn.Module:
        """Names and buffers, and what this rank has of the parameters."""
        ...

    @property
    def holds_whole_model(self) -> bool:
        """Whether `model` has all parameters, in their full precision, on every rank."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers the whole model has, tied ones once."""
        ...

    def whole_parameter(self, name: str) -> Tensor | None:
        """A parameter as it is now, in its shape, on rank 0; None elsewhere. Every rank calls it; blocks."""
        ...

    def held_bytes(self) -> tuple[int, int, int]:
        """Bytes of parameters, gradients and optimizer state that this rank has held at most at once."""
        ...

    def take_gradient_norms(self) -> dict[str, float] | None:
        """The norm of each parameter's gradient before clipping, of the oldest update not asked for; None: no more."""
        ...


@runtime_checkable
class AddsUpEvaluations(Protocol):
    """A strategy that adds the sums of an evaluation up over all ranks itself, by its own ways."""

    def add_up(self, sums: EvalSums) -> EvalSums:
        """The sums over all ranks. Every rank calls it; blocks."""
        ...
