"""What a save does to the disk, call by call: the test that replays crashes records exactly these."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

if sys.platform == "darwin":
    import fcntl


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each synced into the one that holds it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; the tensors are contiguous, on the CPU, and share no memory."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors makes a file that only its owner may read


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
