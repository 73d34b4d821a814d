"""Files of rows for tests, and what their samples must be, computed the slow way; and what a dataset holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.data.datasets import Dataset
from smolcluster.data.tokenizer import ByteTokenizer

KINDS = ("jsonl", "parquet", "text", "hub")
Sample = tuple[tuple[int, ...], tuple[int, ...]]


def numbered_rows(count: int) -> list[str]:
    """Different texts from 5 to 60 characters, with an empty row here and there and letters of two bytes."""
    return ["" if i % 13 == 5 else f"{i:04d}" + "abcdefghü" * (i * 7 % 6) + "." for i in range(count)]


def write_rows(kind: str, folder: Path, rows: Sequence[str], row_group_size: int = 40) -> tuple[str, Path]:
    """Write rows as one kind of data; its `data.dataset` and `data.path`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        path = folder / "rows.txt"
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="")
        return "text", path
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
        path = folder / "rows.parquet"
        table = pyarrow.table({"number": list(range(len(rows))), "text": list(rows)})
        parquet.write_table(table, path, row_group_size=row_group_size)
        return "parquet", path
    if kind == "hub":
        pytest.importorskip("datasets", reason="needs the extra hf")
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            _write_json(folder / f"train-{number}.jsonl", part)
        return str(folder), folder
    path = folder / "rows.jsonl"
    _write_json(path, rows)
    return "jsonl", path


def _write_json(path: Path, rows: Sequence[str]) -> None:
    lines = [json.dumps({"number": i, "text": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines), encoding="utf-8")  # no line break at the end


def samples_of(rows: Sequence[str], max_seq_len: int) -> list[Sample]:
    """Every window of every row, with the byte tokenizer."""
    samples = []
    for row in rows:
        tokens = [*(row + "\n").encode()] if row.strip() else []
        for start in range(0, len(tokens) - 1, max_seq_len):
            targets = tokens[start + 1 : start + max_seq_len + 1]
            inputs = tokens[start : start + len(targets)]
            padding = max_seq_len - len(targets)
            samples.append((tuple(inputs + [0] * padding), tuple(targets + [NO_TARGET] * padding)))
    return samples


def samples_in(micro_batches: Sequence[Batch]) -> list[Sample]:
    """The samples of a step."""
    return [
        (tuple(inputs), tuple(targets))
        for batch in micro_batches
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    ]


def data_folder() -> Path | None:
    """SMOLCLUSTER_DATA, or ../shared/data beside the checkout."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("SMOLCLUSTER_DATA") or beside)
    return folder if (folder / "mnist" / "train-images-idx3-ubyte.gz").is_file() else None


def everything(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return dataset.batch(torch.arange(len(dataset)))


def text_of(dataset: Dataset) -> str:
    inputs, targets = everything(dataset)
    return ByteTokenizer().decode(torch.cat([inputs.flatten(), targets[-1, -1:]]))
