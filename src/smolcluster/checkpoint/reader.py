"""A checkpoint that is on this machine's disk, verified when opened, read tensor by tensor or slice by slice."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolcluster.checkpoint.index import DTYPE_OF, DTYPES, Index, Part, TensorEntry, read_index, require_regular
from smolcluster.checkpoint.state import Kind
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject
from smolcluster.transport.tensors import raw_bytes

_HASH_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a safetensors file; `start` is its first byte."""

    dtype: str
    shape: list[int]
    start: int


class Checkpoint:
    """A StateReader (see state.py) of the files in a folder. Holds none of them open; not thread-bound."""

    def __init__(self, path: Path) -> None:
        """Verify all files; blocks while it reads every byte of them once.

        Args:
            path: the checkpoint's own folder.

        Raises:
            CheckpointError: a file is missing, damaged or foreign; names it.
        """
        self.path = path
        self._index = read_index(path)
        self._stored = {name: _verified(path / name, self._index) for name in self._index.files}
        for name, entry in self._index.tensors.items():
            for part in entry.parts:
                _check_part(path / part.file, name, entry, part, self._stored[part.file].get(part.key))

    @property
    def step(self) -> int:
        """Updates that the run had made."""
        return self._index.step

    @property
    def meta(self) -> JsonObject:
        """What the writer stored beside the tensors, such as the configuration."""
        return self._index.meta

    @property
    def aliases(self) -> dict[str, str]:
        """For every further name of a tied tensor the name it is stored under."""
        return dict(self._index.aliases)

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted; tied names too."""
        every = (*self._index.tensors, *self._index.aliases)
        return sorted(name for name in every if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return tuple(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return DTYPE_OF[self._entry(name).dtype]

    def kind(self, name: str) -> Kind:
        """What the tensor is for.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._entry(name).kind

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its shape, on the CPU; a copy.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read any more.
        """
        shape = self.shape(name)
        return self.read_slice(name, 0, math.prod(shape)).view(shape)

    def read_slice(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor from `start` on: (count,), on the CPU. Reads only these bytes.

        Raises:
            CheckpointError: there is no such tensor, it is shorter, or its file cannot be read any more.
        """
        entry = self._entry(name)
        check_slice(name, tuple(entry.shape), start, count)
        out = torch.empty(count, dtype=DTYPE_OF[entry.dtype])
        for part in entry.parts:
            first, last = max(start, part.offset), min(start + count, part.offset + part.count)
            if first < last:
                self._read_part(part, first - part.offset, out[first - start : last - start])
        return out

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._index.tensors[self._index.aliases.get(name, name)]
        except KeyError:
            raise no_such_tensor(str(self.path), name) from None

    def _read_part(self, part: Part, skip: int, out: Tensor) -> None:
        # Not by safe_open: it maps the file into memory. A map of a file that is cut short ends the process, keeps
        # Windows from deleting the folder, and each opening parses the whole header again.
        file = self.path / part.file
        data = raw_bytes(out)
        try:
            with file.open("rb") as opened:
                opened.seek(self._stored[part.file][part.key].start + skip * out.element_size())
                taken = opened.readinto(data)
        except OSError as exc:
            raise CheckpointError(f"{file} cannot be read ({exc.strerror or exc}). Use another checkpoint") from exc
        if taken != data.nbytes:
            raise CheckpointError(f"{file} has become shorter since it was opened. Use another checkpoint")


def check_slice(name: str, shape: tuple[int, ...], start: int, count: int) -> None:
    """Refuse elements that a tensor does not have.

    Raises:
        CheckpointError: it is shorter.
    """
    if start < 0 or count < 0 or start + count > math.prod(shape):
        raise CheckpointError(
            f"tensor {name!r} of the checkpoint has shape {shape}, elements {start} to {start + count} were asked for"
        )


def no_such_tensor(where: str, name: str) -> CheckpointError:
    """The error of a name that a checkpoint does not have."""
    return CheckpointError(f"{where} has no tensor {name!r}: it is of another model, or without that part of the state")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_HASH_PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()


def _verified(file: Path, index: Index) -> dict[str, _Stored]:
    """The tensors of a file, after its length and hash were found to be those of the index."""
    require_regular(file)
    expected = index.files[file.name]
    try:
        found = file.stat().st_size
        if found != expected.bytes:
            raise CheckpointError(f"{file} has {found} bytes, its index says {expected.bytes}. Use another checkpoint")
        if sha256_of(file) != expected.sha256:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not that of the index. Use another checkpoint")
        return _stored_tensors(file)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{file} cannot be read ({exc}). Use another checkpoint") from exc


def _stored_tensors(file: Path) -> dict[str, _Stored]:
    with safe_open(file, framework="numpy"):
        pass  # safetensors checks what follows: the header is JSON, and its tensors fill the file without a gap
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    return {
        key: _Stored(entry["dtype"], entry["shape"], 8 + header_bytes + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _check_part(file: Path, name: str, entry: TensorEntry, part: Part, stored: _Stored | None) -> None:
    if stored is None:
        raise CheckpointError(
            f"{file} has no tensor {part.key!r}, where the index puts {name!r}. Use another checkpoint"
        )
    is_whole = part.count == math.prod(entry.shape) and stored.shape == entry.shape
    if stored.dtype != DTYPES[DTYPE_OF[entry.dtype]][1] or not (is_whole or stored.shape == [part.count]):
        raise CheckpointError(
            f"{file} has {part.key!r} as {stored.dtype} of shape {stored.shape}, the index says {entry.dtype} with "
            f"{part.count} elements of shape {entry.shape}. Use another checkpoint"
        )
