"""Real runs of mp and mp_pipeline on a stream, and with dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from run.real_runs import start, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = (
    "training.eval_steps=null",
    "model.model_dim=16",
    "model.num_heads=2",
    "model.ff_dim=16",
    "checkpoint.steps=null",
)


def train(folder: Path, preset: str, *arguments: str, overrides: tuple[str, ...]) -> tuple[dict[str, Any], list[float]]:
    """The run's summary, and the losses of its steps."""
    options = [part for override in (*SMALL, *overrides) for part in ("--override", override)]
    process = start(folder, "--preset", preset, *arguments, *options)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_steps = {row["step"]: row["train/loss"] for row in rows if row["rank"] == 0 and "train/loss" in row}
    return summary_of(folder), [of_steps[step] for step in sorted(of_steps)]


@pytest.mark.parametrize("preset", ["mp_gpt", "pipeline_gpt"])
def test_a_stream_has_the_losses_of_single(preset: str, tmp_path: Path) -> None:
    """Past the end of an epoch. The first rank reads its inputs, the last one its targets, all how many there are."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {row} " * (1 + row % 5)}) + "\n" for row in range(120)))
    stream = ("data.dataset=jsonl", f"data.path={file}", "data.streaming=true", "model.max_seq_len=16")
    overrides = (*stream, "training.precision=fp64", "training.max_steps=20", "training.epochs=null")
    single, expected = train(tmp_path / "single", preset, "--algorithm", "single", overrides=overrides)
    staged, found = train(tmp_path / "staged", preset, "--local", "3", overrides=overrides)
    assert len(found) == len(expected) == 20
    assert max(abs(mine - other) for mine, other in zip(found, expected, strict=True)) < 1e-11
    assert (staged["samples"], staged["tokens"]) == (single["samples"], single["tokens"])


def test_with_dropout_a_run_is_the_same_every_time(tmp_path: Path) -> None:
    """Each rank draws from a seed of its own."""
    steps = ("training.max_steps=6",)
    once, losses = train(tmp_path / "once", "pipeline_gpt", "--local", "2", overrides=(*steps, "model.dropout=0.2"))
    again, losses_again = train(
        tmp_path / "again", "pipeline_gpt", "--local", "2", overrides=(*steps, "model.dropout=0.2")
    )
    assert losses_again == losses
    assert again["weights_sha256"] == once["weights_sha256"]
    _, without = train(tmp_path / "without", "pipeline_gpt", "--local", "2", overrides=steps)
    assert without[0] != losses[0]
