"""What the engine writes, against transformers' `generate`, in float64: every split with every way of asking.

    python benchmarks/serving_equality.py             all cells of small models, one family after the other (an hour)
    python benchmarks/serving_equality.py --every 7   every seventh of them
    python benchmarks/serving_equality.py 124m        GPT-2 of 124 M parameters, three cells

A cell: split over 1 to 4 stages; 1 to 8 requests at once with prompts of mixed length, every other one sampled; prompts
whole, in small pieces, or alike in any case; beginnings computed before or not; the chain fails early, late or never.
Token ids are to be equal, logits of every token within 1e-9. Weights have a standard deviation of 0.2 and heads are not
tied: an answer of 64 tokens with fewer than 20 different ones counts as a failure. The cells are those of
tests/serving/cells.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from models.hf_folders import FAMILIES, make_hf_folder
from serving.cells import CUTS, LENGTH, TOKENS, Cell, Model, check, random_model, rows
from smolcluster.device import prepare_process

LARGE_CELLS = (
    Cell((), 1, "whole", has_prefix=False, fails_at=None),
    Cell((3, 9), 4, "small", has_prefix=True, fails_at=None),
    Cell((6,), 3, "whole", has_prefix=False, fails_at=12),
)


def make_124m(folder: Path) -> Path:
    """GPT-2's shape, with an untied head."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": 3072, "n_positions": LENGTH, "vocab_size": 50257}
    return make_hf_folder(folder, "gpt2", tie_word_embeddings=False, **sizes)


def main() -> None:
    """Check, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["small", "124m"], nargs="?", default="small")
    parser.add_argument("--every", type=int, default=1, help="of the small models' cells")
    arguments = parser.parse_args()
    prepare_process()
    failures: list[str] = []
    began, count = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "124m":
            pairs = [(make_124m(Path(folder, "124m")), cell) for cell in LARGE_CELLS]
        else:
            folders = {family: random_model(Path(folder, family), family) for family in FAMILIES}
            cells = [Cell(cuts, *row) for cuts in CUTS for row in rows()]
            pairs = [*zip(itertools.cycle(folders.values()), cells, strict=False)][:: arguments.every]
            pairs.sort(key=lambda pair: pair[0])
        models: dict[Path, Model] = {}
        for path, cell in pairs:
            model = models.setdefault(path, Model(path))
            try:
                check(model, cell)
            except Exception as error:  # noqa: BLE001 - each is counted, and the others are run
                failures.append(f"{path.name} {cell}: {str(error)[:300]}")
                print("FAILED", failures[-1], flush=True)
            count += 1
            print(f"{count} of {len(pairs)}: {path.name} {cell}", flush=True)
    found: dict[str, Any] = {
        "cells": count,
        "tokens_each": TOKENS,
        "failures": failures,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    save(f"serving_equality_{arguments.what}", found)
    print(f"{count - len(failures)} of {count} cells hold")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
