"""`smolcluster export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder, its checkpoints/, or one checkpoint.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; a new or empty folder.")],
) -> None:
    """Write a trained model as a Hugging Face folder (config.json, model.safetensors, tokenizer files).

    transformers loads it. The built-in gpt becomes a GPT-2 with the same logits, hf stays what it was.
    """
    from smolcluster.run.export import export_model

    done = export_model(source, folder)
    for reason in done.skipped:
        typer.echo(f"skipped: {reason}", err=True)
    typer.echo(f"{done.model} after {done.step} steps, weights_sha256 {done.weights_sha256}")
    typer.echo(f"written to {folder}: {', '.join(done.files)}")
