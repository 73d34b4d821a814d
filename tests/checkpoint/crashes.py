"""What a disk may hold after a power cut: records the store's calls and replays any beginning of them.

A file's content is lost, halved or zeroed unless it was synced after its last write; an entry of a folder (a new name,
another name, a deletion) may be missing unless the folder was synced afterwards, each entry on its own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from smolcluster.checkpoint import disk


@dataclass(frozen=True)
class Call:
    """One call that touches the disk; `what` is make, write, sync_file, sync_folder, rename, delete or note."""

    what: str
    path: Path
    content: bytes = b""
    target: Path = Path()
    note: int = 0


class Recorder:
    """Stands between the store and the disk, lets every call through and remembers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self._real = {name: getattr(disk, name) for name in dir(disk) if not name.startswith("_")}
        for name in ("make_folder", "write_tensors", "write_text", "sync_file", "sync_folder", "rename", "remove"):
            monkeypatch.setattr(disk, name, getattr(self, name))
        monkeypatch.setattr(disk, "_sync", lambda path, flags: None)  # the crashes of this test need no real disk

    def note(self, number: int) -> None:
        """Mark a moment."""
        self.calls.append(Call("note", Path(), note=number))

    def make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            disk.make_folder(folder.parent)
            self.calls.append(Call("make", folder))
            self._real["make_folder"](folder)

    def write_tensors(self, file: Path, described: Any, values: Any) -> None:
        self._real["write_tensors"](file, described, values)
        self.calls.append(Call("write", file, file.read_bytes()))

    def write_text(self, file: Path, text: str) -> None:
        self._real["write_text"](file, text)
        self.calls.append(Call("write", file, file.read_bytes()))

    def sync_file(self, file: Path) -> None:
        self.calls.append(Call("sync_file", file))

    def sync_folder(self, folder: Path) -> None:
        self.calls.append(Call("sync_folder", folder))

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent
        self._real["rename"](source, target)
        self.calls.append(Call("rename", source, target=target))

    def remove(self, path: Path) -> None:
        inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
        self.calls.extend(Call("delete", doomed) for doomed in [*inside, path] if doomed.exists())
        self._real["remove"](path)


@dataclass
class _File:
    content: bytes = b""
    is_synced: bool = False


@dataclass
class _Folder:
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[dict[str, _File | _Folder | None]] = field(default_factory=list)  # changes since the last sync

    def now(self) -> dict[str, _File | _Folder]:
        return _changed(self.durable, self.pending)

    def change(self, entries: dict[str, _File | _Folder | None]) -> None:
        self.pending.append(entries)

    def sync(self) -> None:
        self.durable, self.pending = self.now(), []


def crashes(calls: list[Call], root: Path, count: int, seed: int = 0) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """For each beginning of `calls`, `count` states of the disk: (last note, {path: content, None: a folder})."""
    dice = random.Random(seed)
    for end in range(len(calls) + 1):
        top = _replay(calls[:end], root)
        note = max((call.note for call in calls[:end]), default=0)
        # Nothing lost (a kill), all lost that can be, and between them.
        for keep in (1.0, 0.0, *itertools.repeat(0.5, count - 2)):
            yield note, _surviving(top, keep, dice)


def materialise(state: dict[str, bytes | None], root: Path) -> None:
    """Make a folder that holds a state of the disk."""
    root.mkdir(parents=True)
    for name, content in state.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def _replay(calls: list[Call], root: Path) -> _Folder:
    top = _Folder()

    def at(path: Path) -> Any:
        node: Any = top
        for name in path.relative_to(root).parts:
            node = node.now()[name]
        return node

    for call in calls:
        name = call.path.name
        if call.what == "make":
            at(call.path.parent).change({name: _Folder()})
        elif call.what == "write":
            at(call.path.parent).change({name: _File(call.content)})
        elif call.what == "sync_file":
            at(call.path).is_synced = True
        elif call.what == "sync_folder":
            at(call.path).sync()
        elif call.what == "rename":
            at(call.path.parent).change({name: None, call.target.name: at(call.path)})
        elif call.what == "delete":
            at(call.path.parent).change({name: None})
    return top


def _surviving(top: _Folder, keep: float, dice: random.Random, prefix: str = "") -> dict[str, bytes | None]:
    kept = [change for change in top.pending if dice.random() < keep]
    state: dict[str, bytes | None] = {}
    for name, node in _changed(top.durable, kept).items():
        if isinstance(node, _Folder):
            state[prefix + name] = None
            state.update(_surviving(node, keep, dice, f"{prefix}{name}/"))
        else:
            is_whole = node.is_synced or dice.random() < keep
            half = node.content[: len(node.content) // 2]
            state[prefix + name] = node.content if is_whole else dice.choice([b"", half, bytes(len(node.content))])
    return state


def _changed(
    entries: dict[str, _File | _Folder], changes: list[dict[str, _File | _Folder | None]]
) -> dict[str, _File | _Folder]:
    result: dict[str, _File | _Folder | None] = dict(entries)
    for change in changes:
        result.update(change)
    return {name: node for name, node in result.items() if node is not None}
