"""Hugging Face datasets, by id (`org/name` or `org/name:configuration`) or by folder, loaded or streamed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolcluster.data.rows import RowSource, text_column
from smolcluster.errors import DataError
from smolcluster.hub import first_line, why_unreachable

ROWS_AT_ONCE = 1024

_VALIDATION = ("validation", "valid", "val", "dev", "test")  # in order of preference


class HubRows:
    """The rows of one split; see RowSource. A loaded split is one unit, a streamed one has a unit for each file."""

    def __init__(self, name: str, split: Any, column: str | None, *, streaming: bool) -> None:
        """Look which column holds the text.

        Args:
            name: `data.dataset`, for messages.
            split: what `load_dataset` gave.
            column: `data.text_column`.
            streaming: whether it was loaded with streaming=True.

        Raises:
            DataError: the rows cannot be read, or it is not clear which column holds the text.
        """
        self.name = name
        self.nbytes = 0
        self._streaming = streaming
        with _in_one_line(name):
            if split.features is not None:
                types = {key: getattr(feature, "dtype", None) for key, feature in split.features.items()}
                columns = {key: dtype in ("string", "large_string") for key, dtype in types.items()}
            else:  # a stream whose files do not say
                columns = {key: isinstance(value, str) for key, value in next(iter(split), {}).items()}
        self._column = text_column(columns, column, f"dataset {name}")
        self._rows = split.select_columns([self._column])

    def __len__(self) -> int:
        return int(self._rows.num_shards) if self._streaming else 1

    def rows(self, unit: int, start: int = 0) -> Iterator[str]:
        """The rows of a unit; a stream reads what it skips all the same. See RowSource."""
        with _in_one_line(self.name):
            rows = self._rows.shard(num_shards=len(self), index=unit) if self._streaming else self._rows
            for batch in (rows.skip(start) if start else rows).iter(batch_size=ROWS_AT_ONCE):
                yield from (text or "" for text in batch[self._column])


def open_hub(
    dataset: str, train_split: str, column: str | None, *, streaming: bool, known: tuple[str, ...]
) -> tuple[RowSource, RowSource | None]:
    """The rows to train on, and those of the validation split if there is one; blocks for a download.

    Args:
        dataset: `data.dataset`: an id, an id and a configuration, or a folder.
        train_split: `data.train_split`.
        column: `data.text_column`.
        streaming: read while training, keep nothing on disk.
        known: the names of the datasets that are built in, for the message.

    Raises:
        DataError: it cannot be had, or has no such split.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as exc:
        raise DataError(
            f"data.dataset is {dataset!r}: not built in ({', '.join(known)}), and datasets of Hugging Face need the "
            'package datasets. Install it: pip install "smolcluster[hf]"'
        ) from exc
    path, configuration = _parted(dataset)
    if not Path(path).is_dir():
        _check_reachable(dataset, known)
    datasets.disable_progress_bars()  # every rank would show its own
    with _in_one_line(dataset):
        splits = datasets.load_dataset(path, configuration, streaming=streaming)
    if train_split not in splits:
        raise DataError(
            f"data.train_split is {train_split!r}, but dataset {dataset} has the splits {', '.join(splits)}. "
            "Choose one of them"
        )
    held_out = next((split for split in _VALIDATION if split in splits and split != train_split), None)
    return (
        HubRows(dataset, splits[train_split], column, streaming=streaming),
        None if held_out is None else HubRows(dataset, splits[held_out], column, streaming=streaming),
    )


def _parted(dataset: str) -> tuple[str, str | None]:
    """Path or id, and configuration. A folder may have a colon in its name (`C:\\data`)."""
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        return str(folder), None
    path, _, configuration = dataset.rpartition(":") if ":" in dataset else (dataset, "", "")
    return (str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path), configuration or None


def _check_reachable(dataset: str, known: tuple[str, ...]) -> None:
    """Ask once and briefly whether Hugging Face answers; HF_HUB_OFFLINE says that it is not needed."""
    constants = importlib.import_module("huggingface_hub.constants")
    reason = None if constants.HF_HUB_OFFLINE else why_unreachable(constants.ENDPOINT)
    if reason is not None:
        raise DataError(
            f"data.dataset is {dataset!r}: not built in ({', '.join(known)}), no folder here, and Hugging Face cannot "
            f"be reached at {constants.ENDPOINT} ({reason}). Set HF_HUB_OFFLINE=1 if it was downloaded before, or read "
            "local files: data.dataset=jsonl, parquet or text with data.path"
        )


@contextmanager
def _in_one_line(dataset: str) -> Iterator[None]:
    """Turn what the library raises into a DataError."""
    try:
        yield
    except Exception as exc:  # HTTP clients, pyarrow, decoders: their errors have no common class
        raise DataError(
            f"dataset {dataset} cannot be loaded from Hugging Face ({first_line(exc)}). Check "
            "its name and data.train_split, or read local files: data.dataset=jsonl, parquet or text with data.path"
        ) from exc
