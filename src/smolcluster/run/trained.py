"""A model as a run left it: from a checkpoint, with what its text is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from smolcluster.checkpoint.store import load_weights
from smolcluster.config.schema import Config, reads_text
from smolcluster.data.tokenizer import Tokenizer, load_tokenizer
from smolcluster.errors import CheckpointError
from smolcluster.models.build import restore_model

IMAGE_CLASSES = 10  # of mnist and digits


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds.

    Attributes:
        model: on the CPU, in the precision of the run.
        config: of the run.
        tokenizer: of its data; None: it was trained on images.
        step: updates that the weights had.
        skipped: why newer checkpoints of the run were passed over, a clause for each.
    """

    model: nn.Module
    config: Config
    tokenizer: Tokenizer | None
    step: int
    skipped: list[str]


def load_trained(source: Path) -> Trained:
    """Read a model back; blocks.

    Args:
        source: a run folder, a folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not say how its model is built.
        ConfigError, DataError: what its configuration names (a model's folder, a tokenizer, a class) is gone.
    """
    tensors, index = load_weights(source)
    meta, step = index["meta"], index["step"]
    try:
        config = Config.model_validate(meta["config"] if isinstance(meta, dict) else None)
    except (KeyError, ValidationError) as exc:
        raise CheckpointError(
            f"the checkpoint in {source} does not say how its model is built. Use one that this release has written"
        ) from exc
    tokenizer = load_tokenizer(config.data.tokenizer) if reads_text(config) else None
    model = restore_model(
        config.model,
        tensors,
        origin=source,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        num_classes=None if tokenizer else IMAGE_CLASSES,
    )
    skipped = [str(reason) for reason in index["skipped"]] if isinstance(index["skipped"], list) else []
    return Trained(model, config, tokenizer, step if isinstance(step, int) else 0, skipped)
