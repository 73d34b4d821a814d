"""What a save does to the disk, call by call: the test that replays crashes records exactly these."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from smolcluster.checkpoint.index import DTYPES
from smolcluster.kinds import JsonObject
from smolcluster.transport.tensors import raw_bytes

if sys.platform == "darwin":
    import fcntl


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each synced into the one that holds it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_tensors(file: Path, described: Mapping[str, Tensor], values: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, tensor by tensor: one of them is in memory at a time. The library needs all at once.

    Args:
        file: where to.
        described: dtype and shape of each tensor by name; may be on the meta device.
        values: gives a tensor, on the CPU and contiguous; called once for each, in the order of `write_order`.
    """
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    names = write_order(described)
    for name in names:
        tensor = described[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype][1], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            opened.write(raw_bytes(values(name)))


def write_order(described: Mapping[str, Tensor]) -> Sequence[str]:
    """The order of tensors in a file: by the size of their elements, so that all are aligned, then by name."""
    return sorted(described, key=lambda name: (-described[name].element_size(), name))


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 file."""
    file.write_text(text, encoding="utf-8", newline="\n")


def sync_file(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    # Windows syncs only descriptors that may write.
    _sync(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name != "nt":  # Windows cannot open a folder; its file system journals renames
        _sync(folder, os.O_RDONLY)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name in the same folder, at once; replaces a file."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        if sys.platform == "darwin":
            # fsync of macOS stops at the drive's cache. Network file systems do not know F_FULLFSYNC.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
