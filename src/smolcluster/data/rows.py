"""Rows of text, read piece by piece: JSON lines, lines of a text, parquet. Nothing here grows with the data.

A source is a list of *units* that can be read in any order: pieces of a file that begin and end with a line, or the row
groups of a parquet file.
"""

from __future__ import annotations

import importlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smolcluster.errors import DataError
from smolcluster.hub import first_line

T = TypeVar("T")

UNIT_BYTES = 256 * 2**10  # of a file of lines: small enough to shuffle well, large enough to be read in one go
MAX_UNITS = 2**18  # from 64 GiB on units grow, so that an order of them never takes more than 2 MiB
MAX_LINE_BYTES = 64 * 2**20  # a longer line is no row of text, but a file that is not made of lines
READ_BYTES = 64 * 2**10  # read ahead in a parquet column; the default reads a row group's whole column
MAX_ROWS_AT_ONCE = 1024  # of parquet; also where a dictionary makes rows seem smaller than they are

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TEXT_TYPES = ("string", "large_string", "dictionary<values=string")  # as pyarrow writes its types


class RowSource(Protocol):
    """Texts by unit. Methods may be called from any thread; a unit reads the same on every machine."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def nbytes(self) -> int:
        """All files together; 0 if that is unknown. Tells other data from the same data."""
        ...

    def __len__(self) -> int:
        """Units."""
        ...

    def rows(self, unit: int, start: int = 0) -> Iterator[str]:
        """The texts of a unit in order, from row `start` on; "" where a row has none.

        Raises:
            DataError: a row cannot be read; names file and place.
        """
        ...


def all_rows(source: RowSource) -> Iterator[str]:
    """Every row, in the order of the data."""
    return (text for unit in range(len(source)) for text in source.rows(unit))


def text_column(columns: Mapping[str, bool], asked: str | None, where: str) -> str:
    """Which column holds the text.

    Args:
        columns: by name whether it is one of texts.
        asked: `data.text_column`.
        where: the data, for the message.

    Raises:
        DataError: there is no such column, or it is not clear which.
    """
    texts = [name for name, is_text in columns.items() if is_text]
    if asked is not None and asked in texts:
        return asked
    if asked is None and "text" in texts:
        return "text"
    if asked is None and len(texts) == 1:
        return texts[0]
    found = f"columns of texts: {', '.join(texts) or 'none'}; others: {', '.join(columns.keys() - texts) or 'none'}"
    problem = "it is not clear which column holds the text" if asked is None else f"no column of texts is {asked!r}"
    raise DataError(f"{where}: {problem} ({found}). Set data.text_column to one of the columns of texts")


class LineFiles:
    """Files with a row in each line."""

    def __init__(self, name: str, files: Sequence[Path], parse: Callable[[str], str]) -> None:
        """Look at the files' sizes.

        Args:
            name: for messages.
            files: in the order of the data.
            parse: the text of a line without its end; raises ValueError where the line is wrong.

        Raises:
            DataError: a file cannot be read.
        """
        self.name = name
        self._files = files
        self._parse = parse
        self._sizes = [_checked_size(file) for file in files]
        self.nbytes = sum(self._sizes)
        self._unit_bytes = max(UNIT_BYTES, -(-self.nbytes // MAX_UNITS))
        # Units of all files up to and with each one.
        self._unit_ends = list(accumulate(-(-size // self._unit_bytes) for size in self._sizes))

    def __len__(self) -> int:
        return self._unit_ends[-1]

    def rows(self, unit: int, start: int = 0) -> Iterator[str]:
        """The lines that begin in the unit; blank ones are no rows. See RowSource."""
        index = bisect_right(self._unit_ends, unit)
        number = unit - (self._unit_ends[index - 1] if index else 0)
        path, begin = self._files[index], number * self._unit_bytes
        row = 0
        for offset, line in _lines(path, begin, min(begin + self._unit_bytes, self._sizes[index])):
            if line.isspace():
                continue
            row += 1
            if row > start:
                yield _parsed(path, offset, line, self._parse)


def json_lines(name: str, files: Sequence[Path], column: str | None) -> LineFiles:
    """Files with a JSON object in each line, one key of which is the text.

    Args:
        name: for messages.
        files: in the order of the data.
        column: `data.text_column`.

    Raises:
        DataError: a file cannot be read, or it is not clear which key holds the text.
    """

    def columns_of(line: str) -> dict[str, bool]:
        return {key: isinstance(value, str) for key, value in _json_object(line).items()}

    def text_of(line: str) -> str:
        row = _json_object(line)
        text = row.get(chosen)
        if chosen not in row or not (text is None or isinstance(text, str)):
            found = f"is of type {type(text).__name__}" if chosen in row else "is missing"
            raise ValueError(f"the key {chosen!r}, which holds the text, {found}")
        if text and not text.isascii():
            text.encode()  # half a surrogate pair is JSON, but no text
        return text or ""

    lines = ((path, offset, line) for path in files for offset, line in _lines(path, 0, _checked_size(path)))
    first = next(((path, offset, line) for path, offset, line in lines if not line.isspace()), None)
    if first is None:
        raise DataError(f"{files[0]} has no rows. Give files with one JSON object in each line")
    chosen = text_column(_parsed(*first, columns_of), column, str(first[0]))
    return LineFiles(name, files, text_of)


class ParquetFiles:
    """Parquet files. Of a row group only a few pages are in memory at a time, also where it is the whole file."""

    def __init__(self, name: str, files: Sequence[Path], column: str | None) -> None:
        """Read the files' footers.

        Args:
            name: for messages.
            files: in the order of the data.
            column: `data.text_column`.

        Raises:
            DataError: pyarrow is missing, a file cannot be read, or it is not clear which column holds the text.
        """
        try:
            self._parquet = importlib.import_module("pyarrow.parquet")
            arrow_error: type[Exception] = importlib.import_module("pyarrow").ArrowException
        except ImportError as exc:
            raise DataError('parquet files need pyarrow. Install it: pip install "smolcluster[data]"') from exc
        self.name = name
        self._files = files
        self._errors = (OSError, arrow_error)
        self.nbytes = sum(_checked_size(file) for file in files)
        self._units: list[tuple[int, int]] = []  # (file, row group)
        for index, path in enumerate(files):
            groups, columns = self._footer(path)
            if index == 0:
                self._column = text_column(columns, column, str(path))
            elif not columns.get(self._column):
                raise DataError(f"{path} has no column of texts {self._column!r}, but {files[0]} has. Take it away")
            self._units += [(index, group) for group in range(groups)]

    def __len__(self) -> int:
        return len(self._units)

    def rows(self, unit: int, start: int = 0) -> Iterator[str]:
        """The rows of a row group. See RowSource."""
        index, group = self._units[unit]
        path, row = self._files[index], 0
        try:
            with self._parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
                at_once = _rows_at_once(file.metadata.row_group(group), self._column)
                batches = file.iter_batches(at_once, row_groups=[group], columns=[self._column], use_threads=False)
                for batch in batches:
                    texts = batch.column(0).slice(max(0, start - row)).to_pylist()
                    row += batch.num_rows
                    yield from (text or "" for text in texts)
        except self._errors as exc:
            raise DataError(
                f"{path} row group {group} cannot be read ({first_line(exc)}). Write the file anew"
            ) from exc

    def _footer(self, path: Path) -> tuple[int, dict[str, bool]]:
        """Number of row groups, and by column whether it is one of texts."""
        try:
            with self._parquet.ParquetFile(path) as file:
                columns = {field.name: str(field.type).startswith(_TEXT_TYPES) for field in file.schema_arrow}
                return file.metadata.num_row_groups, columns
        except self._errors as exc:
            raise DataError(f"{path} is not a parquet file that can be read ({first_line(exc)})") from exc


def _rows_at_once(row_group: Any, column: str) -> int:
    """So many rows of a row group as make about UNIT_BYTES."""
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    nbytes: int = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    num_rows: int = row_group.num_rows
    return max(1, min(MAX_ROWS_AT_ONCE, UNIT_BYTES * num_rows // max(nbytes, 1)))


def _lines(path: Path, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of the lines that begin in [begin, end)."""
    try:
        with path.open("rb") as file:
            if begin == 0:
                offset = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
                file.seek(offset)
            else:
                offset = begin - 1
                file.seek(offset)
                # The end of the line before, which belongs to the unit that it begins in.
                while offset < end and (rest := file.readline(end - offset)):
                    offset += len(rest)
                    if rest.endswith(b"\n"):
                        break
            while offset < end and (line := file.readline(MAX_LINE_BYTES + 1)):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path} has a line of more than {MAX_LINE_BYTES} bytes at byte {offset}. A row is one line: "
                        "write the data so, as JSON lines or text"
                    )
                yield offset, line
                offset += len(line)
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror or exc})") from exc


def _parsed(path: Path, offset: int, line: bytes, parse: Callable[[str], T]) -> T:
    try:
        return parse(line.decode("utf-8").rstrip("\r\n"))
    except ValueError as exc:  # that bytes are no UTF-8, too
        raise DataError(f"{path} line {_line_number(path, offset)}: {_reason(exc)}") from exc


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f'a row is a JSON object such as {{"text": "…"}}, not a {type(row).__name__}')
    return row


def _reason(exc: ValueError) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"not UTF-8 text (byte 0x{exc.object[exc.start]:02x}). Convert the file"
    if isinstance(exc, json.JSONDecodeError):
        return f"not a JSON object in one line ({exc.msg} at character {exc.pos + 1}). Mend or delete the line"
    return f"{exc}. Mend or delete the line"


def _line_number(path: Path, offset: int) -> int:
    """Number, from 1, of the line that begins at `offset`."""
    number, remaining = 1, offset
    with path.open("rb") as file:
        while remaining and (part := file.read(min(remaining, 2**20))):
            number += part.count(b"\n")
            remaining -= len(part)
    return number


def _checked_size(path: Path) -> int:
    try:
        with path.open("rb"):  # a file that may not be read shall be named before training, not in its middle
            return path.stat().st_size
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror or exc})") from exc
