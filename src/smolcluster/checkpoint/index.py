"""The index of a checkpoint: which tensors its files hold. It may come from anywhere: nothing in it is believed unseen.

    {"format": "smolcluster-checkpoint", "version": 2, "step": 100,
     "files": {"weights.safetensors": {"bytes": 1234, "sha256": "…"}},
     "tensors": {"model/head": {"kind": "param", "dtype": "float32", "shape": [2, 3],
                                "parts": [{"file": "weights.safetensors", "key": "head", "offset": 0, "count": 6}]}},
     "aliases": {"model/tied": "model/head"}, "meta": {…}, "sha256": "…"}

`offset` and `count` are elements of the flattened tensor. `sha256` is that of all the rest, without blanks and with
sorted keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError

from smolcluster.checkpoint.state import Kind
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject

INDEX = "index.json"
WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"
FORMAT: Literal["smolcluster-checkpoint"] = "smolcluster-checkpoint"
VERSION: Literal[2] = 2

# Name in the index, name in a safetensors file.
DTYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("float64", "F64"),
    torch.float32: ("float32", "F32"),
    torch.float16: ("float16", "F16"),
    torch.bfloat16: ("bfloat16", "BF16"),
    torch.int64: ("int64", "I64"),
    torch.int32: ("int32", "I32"),
    torch.int16: ("int16", "I16"),
    torch.int8: ("int8", "I8"),
    torch.uint8: ("uint8", "U8"),
    torch.bool: ("bool", "BOOL"),
    torch.complex64: ("complex64", "C64"),
}
DTYPE_OF = {name: dtype for dtype, (name, _) in DTYPES.items()}

_FILE_NAME = re.compile(r"weights\.safetensors|state(-rank[0-9]{4,9})?\.safetensors")
# More elements than any tensor has, and strides computed from it still fit into 64 bits.
_MAX_ELEMENTS = 2**48


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FileEntry(_Entry):
    """A file of the checkpoint."""

    bytes: NonNegativeInt
    sha256: str


class Part(_Entry):
    """Where a piece of a tensor lies: `count` elements from `offset` on are the tensor `key` of `file`."""

    file: str
    key: str
    offset: NonNegativeInt
    count: NonNegativeInt


class TensorEntry(_Entry):
    """A tensor of the state."""

    kind: Kind
    dtype: str
    shape: list[NonNegativeInt]
    parts: list[Part]


class Index(_Entry):
    """A whole index."""

    format: Literal["smolcluster-checkpoint"] = FORMAT
    version: Literal[2] = VERSION
    step: NonNegativeInt
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    meta: dict[str, JsonValue]

    def to_text(self) -> str:
        """What goes into the file."""
        document: JsonObject = self.model_dump()
        return json.dumps({**document, "sha256": digest(document)}, indent=1) + "\n"


def digest(document: JsonObject) -> str:
    """SHA-256 of an index without its own `sha256`."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_index(folder: Path) -> Index:
    """The index of a checkpoint, consistent in itself. Its files are not looked at.

    Raises:
        CheckpointError: it is missing, damaged, foreign or of another version.
    """
    file = folder / INDEX
    document = _read_json(file)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no index of a smolcluster checkpoint. Use another folder")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {document.get('version')}, this release reads {VERSION}. Use the release that "
            "wrote it"
        )
    claimed = document.pop("sha256", None)
    if claimed != digest(document):
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one it names. Use another checkpoint")
    try:
        index = Index.model_validate(document)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise CheckpointError(f"{file} is damaged: {where}: {first['msg']}. Use another checkpoint") from exc
    if (problem := find_problem(index)) is not None:
        raise CheckpointError(f"{file} is damaged: {problem}. Use another checkpoint")
    return index


def require_regular(file: Path) -> None:
    """Refuse what is no plain file: a link may lead anywhere, and a pipe would be waited for.

    Raises:
        CheckpointError: it is missing, or a link, folder or device.
    """
    try:
        mode = os.lstat(file).st_mode
    except (OSError, ValueError) as exc:
        reason = "is missing" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc})"
        raise CheckpointError(f"{file} {reason}, so its checkpoint is not whole. Use another one") from exc
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a file"
        raise CheckpointError(f"{file} is {kind}; a checkpoint holds plain files only. Use another one")


def find_problem(index: Index) -> str | None:
    """What contradicts itself in an index, in a clause; None if nothing does."""
    for name in index.files:
        if not _FILE_NAME.fullmatch(name):
            return (
                f"it names a file {name!r}; the files of a checkpoint are {WEIGHTS}, {STATE} and "
                "state-rank0001.safetensors and so on, in its own folder"
            )
    for name, tensor in index.tensors.items():
        if (problem := _problem_of_tensor(tensor, index)) is not None:
            return f"tensor {name!r} {problem}"
    for alias, name in index.aliases.items():
        if alias in index.tensors or name not in index.tensors:
            return f"alias {alias!r} of {name!r} does not lead to a stored tensor"
    return None


def _problem_of_tensor(tensor: TensorEntry, index: Index) -> str | None:
    if tensor.dtype not in DTYPE_OF:
        return f"has the unknown dtype {tensor.dtype!r}"
    if math.prod(max(size, 1) for size in tensor.shape) > _MAX_ELEMENTS:
        return f"has the impossible shape {tensor.shape}"
    covered = 0
    for part in sorted(tensor.parts, key=lambda part: (part.offset, part.count)):
        if part.file not in index.files:
            return f"lies in {part.file!r}, which is not among its files"
        if part.offset != covered:
            wrong = "is there twice" if part.offset < covered else "is missing"
            return f"{wrong} at element {min(part.offset, covered)}"
        covered += part.count
    if covered != math.prod(tensor.shape):
        return f"of shape {tensor.shape} has {covered} elements in its parts"
    return None


def _read_json(file: Path) -> JsonValue:
    require_regular(file)
    try:
        document: JsonValue = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{file} cannot be read ({getattr(exc, 'strerror', None) or 'not JSON'}), so {file.parent} is no whole "
            "checkpoint. Use another one"
        ) from exc
    return document
