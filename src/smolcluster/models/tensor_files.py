"""Tensors from safetensors files, one at a time, by reading exactly their bytes.

A node that holds some layers of a model asks its disk, or the network share, for those layers only. A mapped file would
be asked for page by page, and count as this process's memory.

Source    https://huggingface.co/docs/safetensors, "Format"
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from smolcluster.errors import CheckpointError
from smolcluster.models.folder import weight_files

# More at once is not read faster, and is needed twice.
_CHUNK_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")
# safetensors' own limit.
_MAX_HEADER_BYTES = 100 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: which of the folder's.
        dtype: of its values there.
        shape: its.
        begin: of its bytes, counted from the file's first.
        nbytes: how many.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class TensorFiles:
    """The weights of a folder. Files are opened when something of them is read; `close` it, or use it in `with`."""

    def __init__(self, folder: Path) -> None:
        """Read the files' headers.

        Raises:
            ConfigError: the folder names no weights.
            CheckpointError: a file is missing or damaged; names it.
        """
        self._open: dict[Path, BinaryIO] = {}
        try:
            self.tensors: Mapping[str, StoredTensor] = {
                name: stored for file in weight_files(folder) for name, stored in self._header(file).items()
            }
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is none of this name.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"the model's files have no tensor {name}. Download or copy the folder again")
        return stored

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype.

        Raises:
            CheckpointError: there is none of this name, or its file ends early.
        """
        stored = self.find(name)
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if stored.nbytes:
            self._read_into(stored.file, stored.begin, _bytes_of(tensor))
        return tensor

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill a tensor of the same shape, of any dtype and strides, without a second copy of all of it in memory.

        Raises:
            CheckpointError: there is none of this name, or its file ends early.
        """
        row = 0
        for chunk in self.chunks(name):
            out[row : row + len(chunk)].copy_(chunk)
            row += len(chunk)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor, some rows after the other, (n, ...) each. The memory is used again for those that follow.

        Raises:
            CheckpointError: there is none of this name, or its file ends early.
        """
        stored = self.find(name)
        if not stored.nbytes:
            return
        rows = stored.shape[0]
        each = stored.nbytes // rows
        count = max(1, min(rows, _CHUNK_BYTES // each))
        buffer = torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
        for row in range(0, rows, count):
            chunk = buffer[: min(count, rows - row)]
            self._read_into(stored.file, stored.begin + row * each, _bytes_of(chunk))
            yield chunk

    def _read_into(self, file: Path, begin: int, buffer: memoryview) -> None:
        try:
            stream = self._open.get(file)
            if stream is None:
                stream = self._open[file] = file.open("rb", buffering=0)
            stream.seek(begin)
            got = 0
            while got < len(buffer):
                count = stream.readinto(buffer[got:])  # type: ignore[attr-defined]  # of an unbuffered file
                if not count:
                    raise CheckpointError(f"{file} ends early. Download or copy it again")
                got += count
        except OSError as exc:
            raise CheckpointError(f"{file} cannot be read ({exc.strerror or exc}). Download or copy it again") from exc

    def _header(self, file: Path) -> dict[str, StoredTensor]:
        head = bytearray(_LENGTH.size)
        self._read_into(file, 0, memoryview(head))
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} is no safetensors file. Download or copy it again")
        text = bytearray(length)
        self._read_into(file, _LENGTH.size, memoryview(text))
        data, size = _LENGTH.size + length, file.stat().st_size
        found = {}
        try:
            for name, entry in json.loads(text).items():
                if name == "__metadata__":
                    continue
                begin, end = (int(offset) for offset in entry["data_offsets"])
                dtype, shape = _DTYPES[entry["dtype"]], tuple(int(dim) for dim in entry["shape"])
                if not 0 <= begin <= end or end - begin != torch.Size(shape).numel() * dtype.itemsize:
                    raise ValueError(f"tensor {name} has other bytes than its shape says")
                if data + end > size:
                    raise CheckpointError(f"{file} ends early: {size} of {data + end} bytes. Download or copy it again")
                found[name] = StoredTensor(file, dtype, shape, data + begin, end - begin)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise CheckpointError(f"{file} cannot be read ({exc}). Download or copy it again") from exc
        return found


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
