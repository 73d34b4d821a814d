"""What int8 gradients cost the processor: encoding with error feedback, decoding, and adding, on one core.

    python benchmarks/int8_codec.py

64 MiB of float32 in pieces as an all-reduce cuts them; medians over seven rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from machine import save
from torch import Tensor

from smolcluster.collectives.codec import Int8Codec
from smolcluster.device import prepare_process

ELEMENTS = 16 * 2**20
ROUNDS = 7


def main() -> None:
    """Measure, print and save."""
    prepare_process()
    codec = Int8Codec()
    values, residual, target = torch.randn(ELEMENTS), torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)
    rows = []
    for piece in (128 * 1024, 512 * 1024):
        encoded = [torch.empty(codec.encoded_nbytes(piece), dtype=torch.uint8) for _ in range(ELEMENTS // piece)]
        parts = list(zip(values.split(piece), residual.split(piece), target.split(piece), encoded, strict=True))
        row: dict[str, object] = {"piece_elements": piece}
        row["encode_ms"] = milliseconds(parts, lambda value, lost, total, data: codec.encode(value, data))
        row["encode_with_feedback_ms"] = milliseconds(
            parts, lambda value, lost, total, data: codec.encode_with_feedback(value, lost, data)
        )
        row["decode_ms"] = milliseconds(parts, lambda value, lost, total, data: codec.decode(data, total))
        row["decode_add_ms"] = milliseconds(parts, lambda value, lost, total, data: codec.decode_add(data, total))
        print(row)
        rows.append(row)
    save("int8_codec", {"mebibytes": 64, "rounds": ROUNDS, "rows": rows})


def milliseconds(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], call: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> list[float]:
    """Smallest, median and largest time of a round over all parts."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for part in parts:
            call(*part)
        times.append((time.perf_counter() - start) * 1e3)
    times = times[1:]  # the first touches new memory
    return [round(figure, 1) for figure in (min(times), statistics.median(times), max(times))]


if __name__ == "__main__":
    main()
