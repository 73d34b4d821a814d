"""What the state of a run is made of: named tensors, whole or in pieces, and how they are read back.

Names are paths: `model/<parameter or buffer>`, `optim/<parameter>/<slot>`, `pending/<number>/<parameter>`,
`residual/<parameter>`, `rng/<rank>`. Small numbers are tensors too (float64 holds every integer up to 2^53).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

Kind: TypeAlias = Literal["param", "buffer", "optim", "pending", "residual", "scaler", "rng"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor of the state, or the piece of it that one rank holds.

    Attributes:
        tensor: the values, on any device; any shape if it is the whole, else (n,).
        kind: what it is for.
        shape: of the whole tensor; None: `tensor` is the whole.
        offset: of the piece in the flattened whole, in elements.
        load: gives the values, once, where `tensor` only describes them, on the meta device; None: it has them.
        alias_of: the name of the tensor that this is another name of (tied weights); `tensor` then holds nothing.
    """

    tensor: Tensor
    kind: Kind
    shape: tuple[int, ...] | None = None
    offset: int = 0
    load: Callable[[], Tensor] | None = None
    alias_of: str | None = None

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.tensor.shape) if self.shape is None else self.shape


class StateReader(Protocol):
    """Gives the state back, by name and slice, so that another number of ranks can take other slices.

    Reading may communicate: every rank reads the same names in the same order, though each may want another slice.
    """

    @property
    def step(self) -> int:
        """Updates that the run had made."""
        ...

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its shape, on the CPU.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def read_slice(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor from `start` on: (count,), on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or it is shorter.
        """
        ...
