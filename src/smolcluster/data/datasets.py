"""Splits that are in memory: samples with classes, one long text, documents. A batch is one vectorised gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from smolcluster.data.batch import NO_TARGET
from smolcluster.errors import DataError

Kind = Literal["classes", "text"]


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
        """Targets of these samples, added up: what a step over them scales its gradient by. 0: unknown."""
        ...

    def graded(self, indices: Tensor) -> Tensor | None:
        """The targets that the accuracy is about (Batch.graded): (B, T) bool. None: each target on its own."""
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

    def graded(self, indices: Tensor) -> None:
        """Each target is graded on its own."""
        return None


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

    def graded(self, indices: Tensor) -> None:
        """Each target is graded on its own."""
        return None


class WindowsDataset:
    """Documents, each cut into windows of its own; the last window of a document is padded on the right.

    At every position the target is the document's next token, and NO_TARGET where it has none. A document of n tokens
    has n - 1 targets and so (n - 1) / max_seq_len windows, rounded up; one of a single token has none.
    """

    kind: Kind = "text"
    num_classes = None

    def __init__(
        self,
        name: str,
        tokens: Tensor,
        lengths: Tensor,
        max_seq_len: int,
        vocab_size: int,
        answers: Tensor | None = None,
    ) -> None:
        """Cut documents into windows. There may be none.

        Args:
            name: for messages and the run's configuration.
            tokens: (n,) ids of all documents, one behind the other.
            lengths: (documents,) int64, tokens of each document, from 1.
            max_seq_len: tokens of a window.
            vocab_size: token ids.
            answers: (documents, 2) int64: first token that is graded, and the one behind the last, counted from the
                document's start. Only for documents of at most max_seq_len + 1 tokens. None: all are graded alike.
        """
        self.name = name
        self.input_dim = max_seq_len
        self.vocab_size = vocab_size
        self._tokens = tokens.to(torch.uint8 if vocab_size <= 256 else torch.int32)
        windows = torch.div(lengths - 1 + max_seq_len - 1, max_seq_len, rounding_mode="floor")
        ends = lengths.cumsum(0)
        document = torch.arange(len(lengths)).repeat_interleave(windows)
        number = torch.arange(len(document)) - (windows.cumsum(0) - windows)[document]
        self._starts = (ends - lengths)[document] + number * max_seq_len
        self._counts = torch.clamp(ends[document] - 1 - self._starts, max=max_seq_len)
        self._answers = None if answers is None else answers[document] - 1  # position p predicts token p + 1

    def keep_first(self, count: int) -> None:
        """Leave out all windows behind the first `count`."""
        self._starts, self._counts = self._starts[:count], self._counts[:count]

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, max_seq_len) int64. Padding is token 0 with the target NO_TARGET."""
        positions = self._starts[indices, None] + torch.arange(self.input_dim + 1)
        tokens = self._tokens[positions.clamp_(max=len(self._tokens) - 1)].to(torch.int64)
        is_padding = torch.arange(self.input_dim) >= self._counts[indices, None]
        return tokens[:, :-1].masked_fill(is_padding, 0), tokens[:, 1:].masked_fill(is_padding, NO_TARGET)

    def targets_per_sample(self, indices: Tensor) -> int:
        """The targets that are not padding."""
        return int(self._counts[indices].sum())

    def graded(self, indices: Tensor) -> Tensor | None:
        """The answers' targets, (B, max_seq_len) bool; None if no answers were given."""
        if self._answers is None:
            return None
        answers, positions = self._answers[indices], torch.arange(self.input_dim)
        return (positions >= answers[:, :1]) & (positions < answers[:, 1:])
