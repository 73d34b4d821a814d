"""The user's own torch Dataset as one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from smolcluster.data.datasets import Kind
from smolcluster.errors import DataError


class MapStyle(Protocol):
    """What torch.utils.data.Dataset means by map-style: samples by number."""

    def __len__(self) -> int:
        """Samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""
        ...


class IndexedDataset:
    """A map-style dataset whose samples are pairs (input, target), or mappings.

    With it the loader decides which rank computes which samples: they are the same however many ranks there are, and a
    run can be resumed. Samples are made on the loader's thread, one by one; all must have the same shapes.
    """

    def __init__(
        self,
        samples: MapStyle,
        *,
        keys: tuple[str, str] = ("inputs", "targets"),
        num_classes: int | None = None,
        vocab_size: int | None = None,
        name: str = "own",
    ) -> None:
        """Wrap it; makes the first sample, to see what the others are like.

        Args:
            samples: gives inputs (...) and targets () or (T,), as tensors or numbers. A target is a class, or the next
                token at every position; smolcluster.data.batch.NO_TARGET where nothing is to be predicted.
            keys: of mappings, which values are input and target.
            num_classes: classes, for a model that is built from the data.
            vocab_size: token ids, for the same.
            name: for messages.

        Raises:
            DataError: it has no samples, or they are neither pairs nor mappings with these keys.
        """
        self.name = name
        self.num_classes = num_classes
        self.vocab_size = vocab_size
        self._samples = samples
        self._keys = keys
        if len(self) == 0:
            raise DataError(f"dataset {name} has no samples. Give one with a length above 0")
        self._input, self._target = self._sample(0)
        self.kind: Kind = "text" if self._target.dim() else "classes"
        self.input_dim = self._input.numel()

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...) and targets (B,) or (B, T) int64, stacked."""
        samples = [self._sample(index) for index in indices.tolist()]
        if not samples:
            return self._input.new_empty(0, *self._input.shape), self._target.new_empty(0, *self._target.shape)
        try:
            return torch.stack([sample[0] for sample in samples]), torch.stack([sample[1] for sample in samples])
        except RuntimeError as exc:
            raise DataError(
                f"dataset {self.name}: samples {indices.tolist()} have different shapes ({exc}). Cut or pad them"
            ) from exc

    def targets_per_sample(self, indices: Tensor) -> int:
        """One for each class; 0, unknown, where a sample has several, since any of them may be NO_TARGET."""
        return len(indices) if self.kind == "classes" else 0

    def graded(self, indices: Tensor) -> None:
        """Each target is graded on its own."""
        return None

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self._samples[index]
        if isinstance(sample, Mapping):
            if missing := [key for key in self._keys if key not in sample]:
                raise DataError(
                    f"dataset {self.name}: sample {index} has the keys {', '.join(map(str, sample))}, but not "
                    f"{', '.join(missing)}. Name input and target: IndexedDataset(…, keys=(INPUT, TARGET))"
                )
            sample = tuple(sample[key] for key in self._keys)
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(
                f"dataset {self.name}: sample {index} is a {type(sample).__name__}. Give pairs (input, target) or "
                "mappings"
            )
        target = torch.as_tensor(sample[1])
        if target.is_floating_point() and bool((target != target.round()).any()):
            raise DataError(
                f"dataset {self.name}: the target of sample {index} is {target.tolist()}. Targets are classes or "
                "tokens: give whole numbers"
            )
        return torch.as_tensor(sample[0]), target.to(torch.int64)
