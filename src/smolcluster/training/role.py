"""What a process does in a run: it trains, or (with the parameter-server algorithms) it serves those that do."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from smolcluster.collectives.base import Communicator
from smolcluster.training.trainer import MetricsSink, NoMetrics, Trainer, TrainResult, stop_on_interrupt


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a run gives to the role of one process.

    Attributes:
        metrics: where rows go.
        comm: the ranks of the run; None: one process.
        stop: set to end the run early, from any thread.
    """

    metrics: MetricsSink = field(default_factory=NoMetrics)
    comm: Communicator | None = None
    stop: threading.Event = field(default_factory=threading.Event)


class Role(Protocol):
    """A process's part in a run."""

    def run(self, context: RunContext) -> TrainResult:
        """Do it to the end. Blocks.

        Raises:
            SmolError: the run cannot go on.
        """
        ...


class TrainerRole:
    """Computes: one rank that drives a strategy."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def run(self, context: RunContext) -> TrainResult:
        """Train; the first Ctrl-C finishes the step, the second ends at once."""
        with stop_on_interrupt(context.stop):
            return self._trainer.run(context.metrics, context.comm, context.stop)
