"""Data by name: the one entry that knows every dataset. In memory or streamed, a run sees the same `TrainingData`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from smolcluster.data.batch import Reads
from smolcluster.data.datasets import ClassesDataset, Dataset, TextDataset
from smolcluster.data.documents import check_splits, first_windows, split_documents, windows_of, with_text
from smolcluster.data.files import ENDS, checked_path, kind_of, open_rows, read_text
from smolcluster.data.hub import open_hub
from smolcluster.data.loader import BatchLoader, Step, sampled_steps
from smolcluster.data.mnist import read_mnist
from smolcluster.data.pydoc_text import load_pydoc
from smolcluster.data.root import data_root
from smolcluster.data.rows import RowSource, all_rows
from smolcluster.data.sampler import Sampler, checked_global_batch, checked_weights, seeded_permutation
from smolcluster.data.snli import load_snli
from smolcluster.data.stream import MAX_VALIDATION_WINDOWS, TextStream, hold_out, streamed_steps
from smolcluster.data.tokenizer import Tokenizer, load_tokenizer
from smolcluster.data.wikitext import load_wikitext2
from smolcluster.errors import CheckpointError, DataError
from smolcluster.kinds import JsonObject

FILE_DATASETS = tuple(ENDS)  # read from data.path
DATASET_NAMES = ("mnist", "digits", "wikitext2", "snli", "pydoc", *FILE_DATASETS)
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training images, in units of 255
DIGITS_SPLIT_SEED = 0  # of the split, which is the same for every run; not the run's seed


class TrainingData(Protocol):
    """What a run trains on and validates on."""

    @property
    def validation(self) -> Dataset:
        """The split to evaluate on, in memory."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Token ids, of texts."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Classes, of images."""
        ...

    def steps_per_epoch(self, global_batch: int) -> int:
        """Steps until every sample was used once; the last one may be smaller. A stream is read for that, once."""
        ...

    def loader(
        self,
        rank: int,
        weights: Sequence[float],
        *,
        global_batch: int,
        seed: int,
        micro_batches: int = 1,
        start: JsonObject | None = None,
        max_steps: int | None = None,
        micro_first: bool = False,
        reads: Reads = "all",
    ) -> BatchLoader:
        """The steps of one rank, to be closed.

        Args:
            rank: this rank.
            weights: all ranks' relative shares, in rank order.
            global_batch: samples of one step over all ranks.
            seed: the run's seed. It and the global batch decide which samples a step has, not the ranks.
            micro_batches: parts that a step's samples are split into.
            start: the `position()` of the loader that the run goes on from, of whatever rank; None: the beginning.
            max_steps: number of steps of the whole run. None: without end.
            micro_first: the ranks compute the same micro-batch together; see `micro_ranges`.
            reads: what of its samples the rank looks at.

        Raises:
            CheckpointError: `start` is no position in this data.
            ConfigError: the batch or the shares make no sense.
        """
        ...


@dataclass(frozen=True, slots=True)
class MemoryData:
    """Both splits in memory; also for the user's own datasets."""

    train: Dataset
    validation: Dataset

    @property
    def vocab_size(self) -> int | None:
        """See TrainingData."""
        return self.train.vocab_size

    @property
    def num_classes(self) -> int | None:
        """See TrainingData."""
        return self.train.num_classes

    def steps_per_epoch(self, global_batch: int) -> int:
        """See TrainingData."""
        return Sampler(len(self.train), global_batch, seed=0).steps_per_epoch

    def loader(
        self,
        rank: int,
        weights: Sequence[float],
        *,
        global_batch: int,
        seed: int,
        micro_batches: int = 1,
        start: JsonObject | None = None,
        max_steps: int | None = None,
        micro_first: bool = False,
        reads: Reads = "all",
    ) -> BatchLoader:
        """See TrainingData."""
        position: JsonObject = {"step": 0, "samples": len(self.train)} if start is None else start
        step, samples = position.get("step"), position.get("samples")
        if set(position) != {"step", "samples"} or not isinstance(step, int) or step < 0:
            raise CheckpointError(
                f"the checkpoint's data position {position} is no place in data in memory. Resume with the "
                "data.dataset and data.streaming of the run that wrote it"
            )
        if samples != len(self.train):
            raise CheckpointError(
                f"dataset {self.train.name} has {len(self.train)} samples, but the checkpoint was written with "
                f"{samples}. Resume with the same data"
            )

        def steps_from(place: JsonObject, shares: Sequence[float]) -> Iterator[Step]:
            sampler = Sampler(len(self.train), global_batch, seed, shares)
            first = place["step"]
            assert isinstance(first, int), "a position of this loader"
            return sampled_steps(
                self.train, sampler, rank, micro_batches, first, max_steps, micro_first=micro_first, reads=reads
            )

        return BatchLoader(steps_from, weights, position, rank, global_batch)


class StreamedData:
    """Training data that is read while it is trained on; the validation split is in memory."""

    num_classes = None

    def __init__(self, stream: TextStream, validation: Dataset) -> None:
        """Take what `open_data` opened."""
        self.validation = validation
        self.vocab_size = stream.tokenizer.vocab_size
        self._stream = stream
        self._samples: int | None = None

    def steps_per_epoch(self, global_batch: int) -> int:
        """See TrainingData. The first call blocks while all of the data is read and tokenised."""
        if self._samples is None:
            self._samples = self._stream.count_samples()
        return Sampler(self._samples, global_batch, seed=0).steps_per_epoch

    def loader(
        self,
        rank: int,
        weights: Sequence[float],
        *,
        global_batch: int,
        seed: int,
        micro_batches: int = 1,
        start: JsonObject | None = None,
        max_steps: int | None = None,
        micro_first: bool = False,
        reads: Reads = "all",
    ) -> BatchLoader:
        """See TrainingData."""
        place = self._stream.start() if start is None else self._stream.place(start)
        batch = checked_global_batch(global_batch)

        def steps_from(position: JsonObject, shares: Sequence[float]) -> Iterator[Step]:
            begin, parts = self._stream.place(position), checked_weights(shares)
            return streamed_steps(
                self._stream,
                batch,
                seed,
                parts,
                rank,
                micro_batches,
                begin,
                max_steps,
                micro_first=micro_first,
                reads=reads,
            )

        return BatchLoader(steps_from, weights, place.to_json(), rank, global_batch)


def open_data(
    name: str,
    *,
    path: str | Path | None = None,
    text_column: str | None = None,
    tokenizer: str = "bytes",
    max_seq_len: int | None = None,
    train_split: str = "train",
    streaming: bool = False,
    root: Path | None = None,
) -> TrainingData:
    """Open a dataset by name; blocks, and downloads what is missing where that is possible.

    Args:
        name: `data.dataset`: one of DATASET_NAMES, a Hugging Face id, or a folder that `datasets` understands.
        path: `data.path`, the file or folder of datasets `text`, `jsonl` and `parquet`.
        text_column: `data.text_column`.
        tokenizer: `data.tokenizer`, for texts.
        max_seq_len: `model.max_seq_len`, for texts.
        train_split: `data.train_split`.
        streaming: `data.streaming`: read files or Hugging Face data while training.
        root: folder of the named datasets; None: `data_root()`.

    Raises:
        DataError: no such dataset or split, or a file, package or tokenizer is missing or unreadable.
    """
    try:
        if not streaming:
            splits = load_splits(
                name,
                path=path,
                text_column=text_column,
                tokenizer=tokenizer,
                max_seq_len=max_seq_len,
                train_split=train_split,
                root=root,
            )
            return MemoryData(*splits)
        if name in DATASET_NAMES and name not in FILE_DATASETS:
            raise DataError(
                f"data.streaming is for files ({', '.join(FILE_DATASETS)}) and Hugging Face data; {name} is always in "
                "memory. Set data.streaming=false"
            )
        _check_split(name, train_split)
        length = _checked_length(name, max_seq_len)
        encoder = load_tokenizer(tokenizer)
        rows, held_out = _open_rows(name, path, text_column, train_split, streaming=True)
        if held_out is not None:
            validation = first_windows(name, with_text(all_rows(held_out)), encoder, length, MAX_VALIDATION_WINDOWS)
            stream = TextStream(rows, encoder, length)
        else:
            validation, left_out = hold_out(rows, encoder, length)
            stream = TextStream(rows, encoder, length, left_out)
        if not len(validation):
            raise DataError(f"dataset {name} has no text to validate on: it takes two rows at least. Choose other data")
        return StreamedData(stream, validation)
    except OSError as exc:  # what a reader has not foreseen, such as a folder that nobody may look into
        where = exc.filename or name
        raise DataError(
            f"dataset {name}: {where} cannot be read ({exc.strerror or exc}). Check its permissions"
        ) from exc


def load_splits(
    name: str,
    *,
    path: str | Path | None = None,
    text_column: str | None = None,
    tokenizer: str = "bytes",
    max_seq_len: int | None = None,
    train_split: str = "train",
    root: Path | None = None,
) -> tuple[Dataset, Dataset]:
    """The training and the validation split, in memory. See open_data."""
    folder = data_root() if root is None else root
    _check_split(name, train_split)
    if name == "mnist":
        return _load_mnist(folder / "mnist")
    if name == "digits":
        return _load_digits()
    length = _checked_length(name, max_seq_len)
    encoder = load_tokenizer(tokenizer)
    if name == "wikitext2":
        return load_wikitext2(folder / "wikitext-2", train_split, encoder, length)
    if name == "snli":
        return load_snli(folder / "snli", train_split, encoder, length)
    if name == "pydoc":
        return load_pydoc(encoder, length)
    if name == "text":
        file = checked_path(name, path)
        if file.is_file() and kind_of(name, file) == "text":
            return _load_text(file, encoder, length)
    rows, held_out = _open_rows(name, path, text_column, train_split, streaming=False)
    if held_out is None:
        return split_documents(name, lambda: all_rows(rows), encoder, length)
    train, validation = (windows_of(name, with_text(all_rows(part)), encoder, length) for part in (rows, held_out))
    check_splits(name, train, validation)
    return train, validation


def _open_rows(
    name: str, path: str | Path | None, column: str | None, train_split: str, *, streaming: bool
) -> tuple[RowSource, RowSource | None]:
    if name in FILE_DATASETS:
        return open_rows(name, path, column)
    return open_hub(name, train_split, column, streaming=streaming, known=DATASET_NAMES)


def _check_split(name: str, train_split: str) -> None:
    if name in DATASET_NAMES and name not in ("wikitext2", "snli") and train_split != "train":
        raise DataError(f"data.train_split is {train_split!r}, but dataset {name} has only the training split 'train'")


def _checked_length(name: str, max_seq_len: int | None) -> int:
    if max_seq_len is None or max_seq_len < 1:
        raise DataError(f"dataset {name} needs model.max_seq_len of at least 1 token, got {max_seq_len}")
    return max_seq_len


def _load_mnist(folder: Path) -> tuple[Dataset, Dataset]:
    train, validation = (
        ClassesDataset("mnist", images[:, None], labels, 10, divisor=255.0, mean=MNIST_MEAN, std=MNIST_STD)
        for images, labels in (read_mnist("train", folder), read_mnist("t10k", folder))
    )
    return train, validation


def _load_digits() -> tuple[Dataset, Dataset]:
    try:
        sklearn_datasets = importlib.import_module("sklearn.datasets")
    except ImportError as exc:
        raise DataError('dataset digits needs scikit-learn. Install it: pip install "smolcluster[data]"') from exc
    digits = sklearn_datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = seeded_permutation(len(labels), DIGITS_SPLIT_SEED, 0)
    train_count = len(labels) * 4 // 5
    train, validation = (
        ClassesDataset("digits", images[part], labels[part], 10, divisor=16.0)
        for part in (order[:train_count], order[train_count:])
    )
    return train, validation


def _load_text(file: Path, tokenizer: Tokenizer, max_seq_len: int) -> tuple[Dataset, Dataset]:
    """One long text."""
    tokens = tokenizer.encode(read_text(file))
    windows = (len(tokens) - 1) // max_seq_len
    if windows < 2:
        raise DataError(
            f"data.path {file} has {len(tokens)} tokens, but one window to train on and one to validate need "
            f"{2 * max_seq_len + 1} (2 * model.max_seq_len + 1). Take a longer text or a smaller model.max_seq_len"
        )
    cut = (windows - max(1, windows // 10)) * max_seq_len  # the last tenth of the windows validates
    return (
        TextDataset("text", tokens[: cut + 1], max_seq_len, tokenizer.vocab_size),
        TextDataset("text", tokens[cut:], max_seq_len, tokenizer.vocab_size),
    )
