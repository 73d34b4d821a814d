"""Datasets by name: mnist, digits, text, pydoc. All of a split is in memory; a batch is one vectorised gather."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from smolcluster.data.mnist import read_mnist
from smolcluster.data.root import data_root
from smolcluster.data.sampler import seeded_permutation
from smolcluster.data.tokenizer import Tokenizer, load_tokenizer
from smolcluster.errors import DataError

Kind = Literal["classes", "text"]

DATASET_NAMES = ("mnist", "digits", "text", "pydoc")
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training images, in units of 255
DIGITS_SPLIT_SEED = 0  # of the split, which is the same for every run; not the run's seed
# pydoc: blocks long enough to read as text, many enough (90) that both sides have every kind of it.
PYDOC_BLOCK_CHARS = 4096
PYDOC_HELD_OUT = 10  # every tenth block
PYDOC_SHARED_WORDS = 8  # shorter runs recur in any English text; longer ones are a sentence that was copied


class Dataset(Protocol):
    """One split: samples by index. Methods may be called from any thread."""

    @property
    def name(self) -> str:
        """The dataset's name in `data.dataset`."""
        ...

    @property
    def kind(self) -> Kind:
        """What the targets are: one class for each sample, or the next token at every position."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Classes, for kind "classes"."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Token ids, for kind "text"."""
        ...

    @property
    def input_dim(self) -> int:
        """Values of one sample: pixels, or tokens of a window."""
        ...

    def __len__(self) -> int:
        """Samples of the split."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...) and targets (B,) or (B, T) of the samples `indices` (B,) int64, as copies; B may be 0."""
        ...

    def targets_per_sample(self, indices: Tensor) -> int:
        """Targets of these samples, added up: what a step over them scales its gradient by."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ClassesDataset:
    """Samples with one class each. Inputs are kept as they came (uint8 pixels) and normalised batch by batch.

    Attributes:
        name: for messages and the run's configuration.
        inputs: (N, ...) numbers of any dtype.
        targets: (N,) int64, from 0 to num_classes - 1.
        num_classes: classes.
        divisor: a batch is (inputs / divisor - mean) / std, in float32.
        mean: see divisor.
        std: see divisor.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    num_classes: int
    divisor: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    @property
    def kind(self) -> Kind:
        """One class for each sample."""
        return "classes"

    @property
    def vocab_size(self) -> None:
        """There are no tokens."""
        return None

    @property
    def input_dim(self) -> int:
        """Values of one sample."""
        return self.inputs[0].numel()

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised inputs (B, ...) float32 and targets (B,) int64."""
        inputs = self.inputs.index_select(0, indices).to(torch.float32)
        return inputs.div_(self.divisor).sub_(self.mean).div_(self.std), self.targets.index_select(0, indices)

    def targets_per_sample(self, indices: Tensor) -> int:
        """One for each sample."""
        return len(indices)


class TextDataset:
    """A text as full windows that do not overlap; at every position the target is the next token."""

    kind: Kind = "text"
    num_classes = None

    def __init__(self, name: str, tokens: Tensor, max_seq_len: int, vocab_size: int) -> None:
        """Cut a text into windows; a rest shorter than a window is left out.

        Args:
            name: for messages and the run's configuration.
            tokens: (n,) ids. n tokens give (n - 1) // max_seq_len windows: the last target needs one more token.
            max_seq_len: tokens of a window.
            vocab_size: token ids.

        Raises:
            DataError: there is not one full window.
        """
        windows = (len(tokens) - 1) // max_seq_len
        if windows < 1:
            raise DataError(
                f"dataset {name} has {len(tokens)} tokens, but one window needs model.max_seq_len + 1 = "
                f"{max_seq_len + 1}. Take a longer text or a smaller model.max_seq_len"
            )
        self.name = name
        self.input_dim = max_seq_len
        self.vocab_size = vocab_size
        kept = tokens[: windows * max_seq_len + 1].to(torch.int32)  # half of int64's memory, enough for any vocabulary
        self._inputs = kept[:-1].view(windows, max_seq_len)
        self._targets = kept[1:].view(windows, max_seq_len)

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, max_seq_len) int64."""
        inputs, targets = (part.index_select(0, indices) for part in (self._inputs, self._targets))
        return inputs.to(torch.int64), targets.to(torch.int64)

    def targets_per_sample(self, indices: Tensor) -> int:
        """One for each token: windows are always full."""
        return len(indices) * self.input_dim


def load_splits(
    name: str,
    *,
    path: str | Path | None = None,
    tokenizer: str = "bytes",
    max_seq_len: int | None = None,
    train_split: str = "train",
    root: Path | None = None,
) -> tuple[Dataset, Dataset]:
    """Load a dataset by name; blocks, and downloads what is missing where that is possible.

    Args:
        name: `data.dataset`, one of DATASET_NAMES.
        path: `data.path`, the file of dataset `text`.
        tokenizer: `data.tokenizer`, for texts.
        max_seq_len: `model.max_seq_len`, for texts.
        train_split: `data.train_split`. All datasets here have exactly one, "train".
        root: folder of all datasets; None: `data_root()`.

    Returns:
        The training and the validation split.

    Raises:
        DataError: no such dataset or split, or a file, module or tokenizer is missing or unreadable.
    """
    if name not in DATASET_NAMES:
        raise DataError(
            f"data.dataset is {name!r}; this release has {', '.join(DATASET_NAMES)}, others come later. A text file "
            "can be read with data.dataset=text and data.path"
        )
    if train_split != "train":
        raise DataError(f"data.train_split is {train_split!r}, but dataset {name} has only the training split 'train'")
    if name == "mnist":
        return _load_mnist((data_root() if root is None else root) / "mnist")
    if name == "digits":
        return _load_digits()
    if max_seq_len is None or max_seq_len < 1:
        raise DataError(f"dataset {name} needs model.max_seq_len of at least 1 token, got {max_seq_len}")
    if name == "text":
        return _load_text(path, load_tokenizer(tokenizer), max_seq_len)
    return _load_pydoc(load_tokenizer(tokenizer), max_seq_len)


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


def _load_text(path: str | Path | None, tokenizer: Tokenizer, max_seq_len: int) -> tuple[Dataset, Dataset]:
    if path is None:
        raise DataError("dataset text needs a file: set data.path")
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig")  # bytes: line ends stay what they are on every platform
    except OSError as exc:
        raise DataError(f"data.path {file} cannot be read ({exc.strerror or exc}). Name a text file") from exc
    except UnicodeDecodeError as exc:
        raise DataError(
            f"data.path {file} is not UTF-8 text (byte {exc.start} is 0x{exc.object[exc.start]:02x}). Convert it"
        ) from exc
    tokens = tokenizer.encode(text)
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


def _load_pydoc(tokenizer: Tokenizer, max_seq_len: int) -> tuple[Dataset, Dataset]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as exc:
        raise DataError(
            "dataset pydoc needs Python's own documentation (module pydoc_data), which this Python was installed "
            "without. Use data.dataset=text with data.path, or a complete Python"
        ) from exc
    train, validation = (
        TextDataset("pydoc", tokenizer.encode(text), max_seq_len, tokenizer.vocab_size) for text in pydoc_texts(topics)
    )
    return train, validation


def pydoc_texts(topics: Mapping[str, str]) -> tuple[str, str]:
    """Python's help topics as (training text, held-out text), without text that occurs in both.

    The topics repeat each other: whole paragraphs, and paragraphs that differ in a word. Repeated paragraphs are
    left out; of the held-out ones also those that share PYDOC_SHARED_WORDS words in a row with the training text.

    Args:
        topics: text by topic; their order does not matter.
    """
    blocks: list[list[str]] = []
    block_chars = PYDOC_BLOCK_CHARS
    for paragraph in _distinct_paragraphs(topics):
        if block_chars >= PYDOC_BLOCK_CHARS:
            blocks.append([])
            block_chars = 0
        blocks[-1].append(paragraph)
        block_chars += len(paragraph) + 2
    parts: tuple[list[str], list[str]] = ([], [])
    for index, block in enumerate(blocks):
        parts[index % PYDOC_HELD_OUT == PYDOC_HELD_OUT - 1].extend(block)
    train = "\n\n".join(parts[0])
    trained = {length: set(_runs(train, length)) for length in range(1, PYDOC_SHARED_WORDS + 1)}
    held_out = [
        paragraph
        for paragraph in parts[1]
        # A shorter paragraph counts as one run.
        for length in (min(PYDOC_SHARED_WORDS, len(paragraph.split())),)
        if trained[length].isdisjoint(_runs(paragraph, length))
    ]
    return train, "\n\n".join(held_out)


def _distinct_paragraphs(topics: Mapping[str, str]) -> list[str]:
    """All paragraphs in the order of their topics' names, each once whatever its indentation."""
    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    paragraphs.pop("", None)
    return list(paragraphs.values())


def _runs(text: str, length: int) -> Iterator[str]:
    """All runs of `length` words, with one blank between them."""
    words = text.split()
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
