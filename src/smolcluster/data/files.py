"""The user's own files: which of a folder are trained on, which validate, and how they are read."""

from __future__ import annotations

import re
from pathlib import Path

from smolcluster.data.rows import LineFiles, ParquetFiles, RowSource, json_lines
from smolcluster.errors import DataError

# By the ends of the files' names; `text` takes them all.
ENDS = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "text": (".txt",)}

_VALIDATION = ("validation", "valid", "val", "dev", "eval", "test")  # in order of preference


def open_rows(dataset: str, path: str | Path | None, column: str | None) -> tuple[RowSource, RowSource | None]:
    """The rows to train on, and those to validate on where a folder has files for that.

    In a folder, `validation*`, `valid*`, `val*`, `dev*`, `eval*` and `test*` are for validation: the first of these
    names that is there, the others are left alone. `train*` is for training, or else all that remain.

    Args:
        dataset: `data.dataset`: text, jsonl or parquet.
        path: `data.path`: a file, or a folder.
        column: `data.text_column`.

    Raises:
        DataError: no path, no such file, or not one that can be read.
    """
    file = checked_path(dataset, path)
    if not file.is_dir():
        return _source(dataset, kind_of(dataset, file), [file], column), None
    kinds = [dataset] if dataset != "text" else list(ENDS)
    by_kind = {kind: _files(file, ENDS[kind]) for kind in kinds}
    found = [kind for kind, files in by_kind.items() if files]
    if len(found) != 1:
        ends = ", ".join(f"*{end}" for kind in found or kinds for end in ENDS[kind])
        problem = f"has files of several kinds ({ends})" if found else f"has no file {ends}"
        raise DataError(f"data.path {file} {problem}. Name a folder or file of one kind, or choose data.dataset")
    train, validation = _parts(by_kind[found[0]])
    if not train:
        raise DataError(f"data.path {file} has only files to validate on ({validation[0].name}). Add one to train on")
    return (
        _source(dataset, found[0], train, column),
        _source(dataset, found[0], validation, column) if validation else None,
    )


def checked_path(dataset: str, path: str | Path | None) -> Path:
    """`data.path` if it is there.

    Raises:
        DataError: it is not set, or not there.
    """
    if path is None:
        raise DataError(f"dataset {dataset} needs a file: set data.path")
    file = Path(path).expanduser()
    try:
        file.stat()
    except OSError as exc:
        raise DataError(f"data.path {file} cannot be read ({exc.strerror or exc}). Name a file or folder") from exc
    return file


def kind_of(dataset: str, file: Path) -> str:
    """How a file is read: what `data.dataset` says; with `text` its name decides, and is else one long text."""
    if dataset != "text":
        return dataset
    return next((kind for kind, ends in ENDS.items() if file.name.lower().endswith(ends)), "text")


def read_text(path: Path) -> str:
    """A file's text as it is.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")  # bytes: line ends stay what they are on every platform
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror or exc}). Name a text file") from exc
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path} is not UTF-8 text (byte {exc.start} is 0x{exc.object[exc.start]:02x}). Convert it"
        ) from exc


def _source(dataset: str, kind: str, files: list[Path], column: str | None) -> RowSource:
    if kind == "parquet":
        return ParquetFiles(dataset, files, column)
    if kind == "jsonl":
        return json_lines(dataset, files, column)
    return LineFiles(dataset, files, str)


def _files(folder: Path, ends: tuple[str, ...]) -> list[Path]:
    """All such files below a folder, in the order of their names, which is the same on every platform."""
    try:
        found = [path for path in folder.rglob("*") if path.name.lower().endswith(ends) and path.is_file()]
    except OSError as exc:
        raise DataError(f"data.path {folder} cannot be read ({exc.strerror or exc})") from exc
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _parts(files: list[Path]) -> tuple[list[Path], list[Path]]:
    by_part: dict[str, list[Path]] = {}
    for path in files:
        # `test-00000-of-00001.parquet` is one, `testimony.jsonl` is not.
        word = re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0]
        by_part.setdefault(word if word in (*_VALIDATION, "train") else "", []).append(path)
    validation = next((by_part[word] for word in _VALIDATION if word in by_part), [])
    return by_part.get("train") or by_part.get("", []), validation
