"""What integer weights cost in precision: perplexity of a trained model on wikitext-2, by each --dtype.

    SMOLCLUSTER_DATA=FOLDER python benchmarks/serving_perplexity.py
    python benchmarks/serving_perplexity.py --model FOLDER --text FILE --tokens 24000

The text is cut into pieces of 256 tokens, each seen from its beginning; the layers are those that `serve` runs. The
goal is 1 % of fp32.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from machine import save

from smolcluster.data.tokenizer import load_tokenizer
from smolcluster.device import prepare_process
from smolcluster.models.decoder import Segment
from smolcluster.serving.layer_store import CacheSize, LayerStore

PIECE = 256
DTYPES = ("fp32", "bf16", "int8", "int8-dynamic")


def main() -> None:
    """Measure, print, save."""
    shared = Path(os.environ.get("SMOLCLUSTER_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shared / "stories260K-hf")
    parser.add_argument("--text", type=Path, default=shared / "wikitext-2" / "test.txt")
    parser.add_argument("--tokens", type=int, default=24_000)
    arguments = parser.parse_args()
    prepare_process()
    text = arguments.text.read_text(encoding="utf-8")[: 8 * arguments.tokens]
    ids = load_tokenizer(str(arguments.model)).encode(text)[: arguments.tokens + 1]
    found = {dtype: perplexity(arguments.model, ids, dtype) for dtype in DTYPES}
    change = {dtype: round(found[dtype] / found["fp32"] - 1, 5) for dtype in DTYPES}
    figures = {"model": arguments.model.name, "tokens": len(ids) - 1, "perplexity": found, "change": change}
    print(figures)
    save("serving_perplexity", figures)


def perplexity(model: Path, ids: torch.Tensor, dtype: str) -> float:
    """Of ids (T,)."""
    store = LayerStore(model, dtype)
    decoder = store.decoder(range(store.layers), CacheSize(1, PIECE))
    total = count = 0.0
    for begin in range(0, len(ids) - PIECE, PIECE):
        logits = decoder(ids[begin : begin + PIECE], [Segment(0, 0, PIECE)], list(range(PIECE)))
        targets = ids[begin + 1 : begin + PIECE + 1]
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += PIECE
    return math.exp(total / count)


if __name__ == "__main__":
    main()
