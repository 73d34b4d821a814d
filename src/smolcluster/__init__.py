"""smolcluster: train and serve neural networks on the machines you already own, over plain TCP sockets.

    import smolcluster as smol

    comm = smol.connect()
    strategy = smol.ClassicDP(model, optimizer_factory, comm)
    for micro_batches in batches:
        result = strategy.train_step(micro_batches)

Importing this package imports no torch: a name is looked up in its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolcluster.algorithms.classicdp import ClassicDP
    from smolcluster.algorithms.expert_parallel import ExpertParallel
    from smolcluster.algorithms.fsdp import FSDP
    from smolcluster.algorithms.model_parallel import ModelParallel
    from smolcluster.algorithms.pipeline import Pipeline
    from smolcluster.algorithms.single import Single
    from smolcluster.collectives.base import Communicator, ReduceOp, Work
    from smolcluster.config.load import load_config
    from smolcluster.config.schema import Config
    from smolcluster.data.batch import Batch
    from smolcluster.errors import SmolError
    from smolcluster.run.connect import connect
    from smolcluster.training.optim import optimizer_factory
    from smolcluster.training.schedule import lr_schedule
    from smolcluster.training.step import EvalSums, StepResult
    from smolcluster.training.strategy import Strategy
    from smolcluster.training.trainer import Trainer

__all__ = [
    "connect",
    "Single",
    "ClassicDP",
    "FSDP",
    "ModelParallel",
    "Pipeline",
    "ExpertParallel",
    "Strategy",
    "StepResult",
    "EvalSums",
    "Batch",
    "Trainer",
    "optimizer_factory",
    "lr_schedule",
    "Communicator",
    "ReduceOp",
    "Work",
    "Config",
    "load_config",
    "SmolError",
]

_MODULES = {
    "connect": "run.connect",
    "Single": "algorithms.single",
    "ClassicDP": "algorithms.classicdp",
    "FSDP": "algorithms.fsdp",
    "ModelParallel": "algorithms.model_parallel",
    "Pipeline": "algorithms.pipeline",
    "ExpertParallel": "algorithms.expert_parallel",
    "Strategy": "training.strategy",
    "StepResult": "training.step",
    "EvalSums": "training.step",
    "Batch": "data.batch",
    "Trainer": "training.trainer",
    "optimizer_factory": "training.optim",
    "lr_schedule": "training.schedule",
    "Communicator": "collectives.base",
    "ReduceOp": "collectives.base",
    "Work": "collectives.base",
    "Config": "config.schema",
    "load_config": "config.load",
    "SmolError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'smolcluster' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"smolcluster.{_MODULES[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
