"""Damaged and forged checkpoints: refused, with the file's name, whatever was done to them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint.states import accept_files, forge, make_shards, save_sharded
from smolcluster.checkpoint.reader import Checkpoint
from smolcluster.checkpoint.store import open_checkpoint, save_checkpoint
from smolcluster.errors import CheckpointError

FILES = ["index.json", "weights.safetensors", "state.safetensors", "state-rank0001.safetensors"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three ranks that no test changes."""
    return save_sharded(tmp_path_factory.mktemp("original"))


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def contents(checkpoint: Checkpoint) -> dict[str, object]:
    """All that a checkpoint gives."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    return {
        "step": checkpoint.step,
        "meta": checkpoint.meta,
        "kinds": {name: checkpoint.kind(name) for name in tensors},
        "tensors": {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()},
    }


def contents_or_error(path: Path) -> dict[str, object] | str:
    """All that it gives, or the message of the CheckpointError. Any other error is a defect."""
    try:
        return contents(Checkpoint(path))
    except CheckpointError as error:
        return str(error)


def refuses_by_name(path: Path, file: str, message: str = ".") -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path / file) in str(error.value)


# ---- damage


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(path: Path, file: str) -> None:
    (path / file).unlink()
    refuses_by_name(path, file, "is missing")


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_at_any_length_is_named(path: Path, file: str) -> None:
    content = (path / file).read_bytes()
    last = len(content.rstrip())  # without the line's end at its end, an index is whole
    for length in {0, 1, 7, 8, 9, last - 1, *range(0, last, max(1, last // 50))}:
        (path / file).write_bytes(content[:length])
        refuses_by_name(path, file)


@pytest.mark.parametrize("file", FILES)
def test_bytes_behind_the_end_are_named(path: Path, file: str) -> None:
    with (path / file).open("ab") as opened:
        opened.write(b"{}")
    refuses_by_name(path, file)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(path: Path, file: str, position: int, bit: int) -> None:
    whole = (path / file).read_bytes()
    before = contents(Checkpoint(path))
    flipped = bytearray(whole)
    flipped[position % len(whole)] ^= 1 << bit
    (path / file).write_bytes(flipped)
    after = contents_or_error(path)
    (path / file).write_bytes(whole)
    if isinstance(after, str):
        assert str(path / file) in after
    else:
        assert file == "index.json"  # one blank for another
        assert after == before


@pytest.mark.parametrize("file", FILES[1:])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_forged_file_with_a_true_hash_is_read_or_refused_by_name(
    path: Path, file: str, position: int, byte: int
) -> None:
    whole, index = (path / file).read_bytes(), (path / "index.json").read_bytes()
    forged = bytearray(whole)
    forged[position % (8 + int.from_bytes(whole[:8], "little"))] = byte  # in the header
    (path / file).write_bytes(forged)
    accept_files(path)
    found = contents_or_error(path)
    (path / file).write_bytes(whole)
    (path / "index.json").write_bytes(index)
    if isinstance(found, str):
        assert str(path / file) in found


def test_files_of_two_checkpoints_are_not_mixed(path: Path) -> None:
    other = save_checkpoint(path.parent, 2, make_shards(2), {})
    for file in ("weights.safetensors", "state.safetensors"):
        mine = (path / file).read_bytes()
        (path / file).write_bytes((other / file).read_bytes())
        refuses_by_name(path, file)
        (path / file).write_bytes(mine)
    (path / "state.safetensors").write_bytes((path / "weights.safetensors").read_bytes())
    refuses_by_name(path, "state.safetensors")


def test_a_file_that_is_cut_after_opening_is_named(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    (path / "state.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"state\.safetensors has become shorter"):
        checkpoint.read("scaler")
    (path / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"state\.safetensors cannot be read"):
        checkpoint.read("scaler")


# ---- foreign and forged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\x80\x04\x95pickle", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"step": 1' + b"0" * 10_000 + b"}", "not JSON"),
        (b"[]", "no index of a smolcluster checkpoint"),
        (b'{"format": "other"}', "no index of a smolcluster checkpoint"),
        (b'{"format": "smolcluster-checkpoint", "version": 1}', "format version 1, this release reads 2"),
        (b'{"format": "smolcluster-checkpoint", "version": {}}', "format version"),
        (b'{"format": "smolcluster-checkpoint", "version": 2}', "SHA-256"),
        (b'{"format": "smolcluster-checkpoint", "version": 2, "sha256": [1]}', "SHA-256"),
    ],
)
def test_what_is_no_index_is_named(path: Path, content: bytes, message: str) -> None:
    (path / "index.json").write_bytes(content)
    refuses_by_name(path, "index.json", message)


def _first_part(index: Any) -> Any:
    return index["tensors"]["model/first"]["parts"][0]


FORGERIES: list[tuple[str, Callable[[Any], object], str]] = [
    ("no step", lambda index: index.pop("step"), "step: Field required"),
    ("negative step", lambda index: index.update(step=-1), "step: Input should be greater"),
    ("step as text", lambda index: index.update(step="1"), "step: Input should be a valid integer"),
    ("unknown key", lambda index: index.update(code="print()"), "code: Extra inputs"),
    ("files as a list", lambda index: index.update(files=[]), "files: Input should be"),
    ("parts as a number", lambda index: index["tensors"]["model/first"].update(parts=3), r"model/first.parts"),
    ("unknown kind", lambda index: index["tensors"]["model/first"].update(kind="code"), r"model/first.kind"),
    ("unknown dtype", lambda index: index["tensors"]["model/first"].update(dtype="object"), "unknown dtype 'object'"),
    ("negative offset", lambda index: _first_part(index).update(offset=-4), r"parts.0.offset"),
    ("negative count", lambda index: _first_part(index).update(count=-4), r"parts.0.count"),
    ("negative size", lambda index: index["tensors"]["model/first"].update(shape=[-4]), r"shape.0"),
    ("a gap", lambda index: _first_part(index).update(offset=1), "is missing at element 0"),
    ("an overlap", lambda index: index["tensors"]["model/split"]["parts"][2].update(offset=6), "is there twice"),
    ("a part twice", lambda index: index["tensors"]["model/first"]["parts"].append(_first_part(index)), "twice"),
    ("no parts", lambda index: index["tensors"]["model/first"].update(parts=[]), "has 0 elements in its parts"),
    ("too long a part", lambda index: _first_part(index).update(count=5), "has 5 elements in its parts"),
    ("huge shape", lambda index: index["tensors"]["model/first"].update(shape=[2**62, 4]), "impossible shape"),
    ("huge but empty", lambda index: index["tensors"]["model/nothing"].update(shape=[0, 2**62, 2**62]), "impossible"),
    ("huge numbers", lambda index: _first_part(index).update(offset=2**200), r"offset|missing"),
    ("file not listed", lambda index: _first_part(index).update(file="other.safetensors"), "not among its files"),
    ("alias of nothing", lambda index: index["aliases"].update({"model/x": "model/y"}), "'model/x' of 'model/y'"),
    ("alias of an alias", lambda index: index["aliases"].update({"model/x": "model/head"}), "does not lead to"),
    ("alias of itself", lambda index: index["aliases"].update({"model/x": "model/x"}), "does not lead to"),
    ("alias of a name", lambda index: index["aliases"].update({"model/first": "model/second"}), "does not lead to"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in FORGERIES], ids=[case[0] for case in FORGERIES])
def test_an_index_that_contradicts_itself_is_named(path: Path, change: Callable[[Any], object], message: str) -> None:
    forge(path, change)
    refuses_by_name(path, "index.json", message)


@pytest.mark.parametrize(
    "name",
    [
        "../weights.safetensors", "../../../etc/passwd", "/etc/passwd", "sub/weights.safetensors", "..", ".", "",
        "..\\weights.safetensors", "C:\\weights.safetensors", "C:weights.safetensors", "index.json", "weights.bin",
        "state-rank1.safetensors\n", "./weights.safetensors", "state-rank0001.safetensors\0", "NUL",
    ],
)  # fmt: skip
def test_a_file_name_that_leaves_the_folder_is_named(path: Path, name: str) -> None:
    shutil.copy(path / "weights.safetensors", path.parent / "weights.safetensors")

    def lead_away(index: Any) -> None:
        index["files"][name] = index["files"].pop("weights.safetensors")
        for tensor in index["tensors"].values():
            for part in tensor["parts"]:
                if part["file"] == "weights.safetensors":
                    part["file"] = name

    forge(path, lead_away)
    with pytest.raises(CheckpointError, match="it names a file") as error:
        open_checkpoint(path)
    assert repr(name) in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("file", FILES)
def test_a_link_is_named_even_if_it_leads_to_the_right_bytes(path: Path, file: str) -> None:
    elsewhere = path.parent / "elsewhere"
    shutil.move(path / file, elsewhere)
    (path / file).symlink_to(elsewhere)
    refuses_by_name(path, file, "is a link")


@pytest.mark.parametrize("file", FILES)
def test_what_is_not_a_file_is_named(path: Path, file: str) -> None:
    (path / file).unlink()
    (path / file).mkdir()
    refuses_by_name(path, file, "is not a file")


@pytest.mark.skipif(os.name == "nt", reason="no named pipes in folders there")
@pytest.mark.parametrize("file", FILES)
def test_a_pipe_is_not_waited_for(path: Path, file: str) -> None:
    (path / file).unlink()
    os.mkfifo(path / file)
    refuses_by_name(path, file, "is not a file")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"first": torch.zeros(4)},  # float64 in the index
        {"first": torch.zeros(5, dtype=torch.float64)},
        {"first": torch.zeros(2, 2, dtype=torch.float64)},
    ],
)
def test_other_tensors_than_the_index_says_are_named(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / "weights.safetensors")

    def only_first(index: Any) -> None:
        del index["aliases"]["model/head"]
        weights = [name for name in index["tensors"] if name.startswith("model/") and name != "model/split"]
        for name in weights:
            if name != "model/first":
                del index["tensors"][name]

    forge(path, only_first)
    accept_files(path)
    refuses_by_name(path, "weights.safetensors", "has no tensor 'first'|has 'first' as")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 100, b"\xff" * 100, b"\x02" + bytes(7) + b"{}"])
def test_what_is_no_safetensors_file_is_named(path: Path, content: bytes) -> None:
    (path / "weights.safetensors").write_bytes(content)
    accept_files(path)
    refuses_by_name(path, "weights.safetensors")


def test_an_index_without_tensors_is_an_empty_checkpoint(path: Path) -> None:
    index = json.loads((save_checkpoint(path.parent / "other", 1, {}, {}) / "index.json").read_text())
    assert (index["files"], index["tensors"]) == ({}, {})
    assert open_checkpoint(path.parent / "other").names() == []
