"""classicdp through the command line, in separate processes, against `single`: every number of 50 AdamW steps.

    python benchmarks/equality.py              all cells, a few minutes
    python benchmarks/equality.py --short      a sample

Tolerances: float64 1e-11; float32 losses 5e-5 and weights 2e-5, but for parameters whose true gradient is zero. AdamW
makes steps of lr out of their rounding noise; they are found by name below. In float32 what remains grows with the
learning rate, for the same reason: single weights with a gradient near zero. It is AdamW's default here, 1e-3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import save

STEPS = 50
GLOBAL_BATCH = 60
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {
        "model.type": "gpt", "model.model_dim": 32, "model.num_layers": 2, "model.num_heads": 4, "model.ff_dim": 128,
        "model.max_seq_len": 16, "model.dropout": 0, "data.dataset": "pydoc", "data.tokenizer": "bytes",
        "training.grad_clip_norm": 0.5, "training.learning_rate": 0.001,
    },
    # 1437 training samples: the 24th step of an epoch has 57.
    "simple_nn": {
        "model.type": "simple_nn", "model.input_dim": 64, "model.hidden": 32, "data.dataset": "digits",
        "training.learning_rate": 0.001,
    },
}  # fmt: skip
TOLERANCE = {"fp64": (1e-11, 1e-11), "fp32": (5e-5, 2e-5)}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to compare. `extra` also goes to the `single` run unless it only divides work."""

    model: str
    precision: str
    ranks: int
    backend: str = "tcp"
    delay: int = 0
    micro_batches: int = 1
    shares: tuple[int, ...] | None = None

    def reference(self) -> Cell:
        """What it is compared with."""
        return Cell(self.model, self.precision, 0, delay=self.delay)


def cells(short: bool) -> list[Cell]:
    """All combinations of ranks, backend and precision; the rest one at a time."""
    if short:
        return [Cell("gpt", "fp64", 3), Cell("simple_nn", "fp64", 2, "gloo", delay=2, shares=(2, 1))]
    everywhere = [
        Cell("gpt", precision, ranks, backend)
        for precision in ("fp64", "fp32")
        for ranks in (1, 2, 3, 4)
        for backend in ("tcp", "gloo")
    ]
    return [
        *everywhere,
        *(Cell("simple_nn", precision, ranks) for precision in ("fp64", "fp32") for ranks in (2, 4)),
        *(Cell("gpt", precision, 3, delay=delay) for precision in ("fp64", "fp32") for delay in (1, 2, 5)),
        Cell("gpt", "fp64", 2, "gloo", delay=2),
        Cell("gpt", "fp64", 3, micro_batches=4),
        Cell("gpt", "fp32", 2, micro_batches=4),
        Cell("simple_nn", "fp64", 3, shares=(5, 3, 1)),
        Cell("gpt", "fp64", 3, shares=(5, 3, 1), delay=2, micro_batches=4),
    ]


def train(cell: Cell, folder: Path) -> Path:
    """Run `smolcluster train`; its run folder."""
    single = cell.ranks == 0
    settings = {
        **MODELS[cell.model],
        "training.precision": cell.precision,
        "training.batch_size": GLOBAL_BATCH // max(cell.ranks, 1),
        "training.eval_steps": 100000,
        "training.micro_batches": cell.micro_batches,
        "cluster.staleness_bound": cell.delay,
    }
    if cell.shares:
        settings["cluster.shares"] = json.dumps(cell.shares)
    command = [sys.executable, "-m", "smolcluster", "train", "--quiet", "--max-steps", str(STEPS), "--out", str(folder)]
    command += ["--algorithm", "single"] if single else ["--algorithm", "classicdp", "--local", str(cell.ranks)]
    command += [] if single else ["--backend", cell.backend]
    subprocess.run(
        command + [w for key, value in settings.items() for w in ("--override", f"{key}={value}")], check=True
    )
    return folder


def losses(folder: Path) -> dict[tuple[int, int], float]:
    """(rank, step) -> train/loss."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(row["rank"], row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of the last checkpoint."""
    from safetensors.torch import load_file

    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}


def zero_gradient(name: str) -> bool:
    """Whether the parameter's true gradient is zero: softmax does not see a constant added to all scores of a query."""
    return "qkv.bias" in name or "c_attn.bias" in name


def compare(ours: Path, single: Path, precision: str) -> dict[str, float]:
    """Largest differences; raises where one is too large."""
    loss_limit, weight_limit = TOLERANCE[precision]
    expected = {step: loss for (_, step), loss in losses(single).items()}
    found = losses(ours)
    assert {step for _, step in found} == set(expected), "steps are missing"
    assert len(expected) == STEPS, len(expected)
    loss_error = max(abs(loss - expected[step]) for (_, step), loss in found.items())
    reference, mine = weights(single), weights(ours)
    assert reference.keys() == mine.keys()
    weight_error = 0.0
    for name, tensor in reference.items():
        apart = (tensor - mine[name]).abs()
        if precision == "fp32" and zero_gradient(name):
            third = tensor.shape[0] // 3
            apart[third : 2 * third] = 0  # the key's part: listed in the docstring, never exact in float32
        weight_error = max(weight_error, float(apart.max()))
    hashes = json.loads((ours / "summary.json").read_text(encoding="utf-8"))["rank_weights_sha256"]
    assert len(set(hashes)) == 1, hashes
    assert loss_error <= loss_limit, (loss_error, loss_limit)
    assert weight_error <= weight_limit, (weight_error, weight_limit)
    return {"loss": loss_error, "weights": weight_error}


def run(wanted: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """Run and compare all cells; their rows."""
    references: dict[Cell, Path] = {}
    rows = []
    for number, cell in enumerate(wanted):
        reference = cell.reference()
        if reference not in references:
            references[reference] = train(reference, folder / f"single{len(references)}")
        apart = compare(train(cell, folder / f"cell{number}"), references[reference], cell.precision)
        rows.append({**{key: getattr(cell, key) for key in Cell.__slots__}, "apart": apart})
        print(json.dumps(rows[-1]), flush=True)
    for cell, path in references.items():
        if cell.delay:
            prompt = references.get(Cell(cell.model, cell.precision, 0))
            assert prompt is None or losses(path) != losses(prompt), "K > 0 changed nothing"
    return rows


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = run(cells(arguments.short), Path(name))
    if not arguments.short:
        save("equality", {"runs": rows})


if __name__ == "__main__":
    main()
