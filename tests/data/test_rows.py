from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.text_files import numbered_rows, write_rows
from smolcluster.data import rows as rows_module
from smolcluster.data.rows import LineFiles, ParquetFiles, all_rows, json_lines, text_column
from smolcluster.errors import DataError

ROWS = numbered_rows(120)


# --- lines


@given(
    st.lists(
        st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=30), max_size=12
    ),
    st.integers(1, 40),
    st.booleans(),
)
def test_every_line_belongs_to_one_unit_whatever_their_size(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.txt"
    path.write_bytes(("\n".join(lines) + ("\n" if ends and lines else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "UNIT_BYTES", unit_bytes)
        source = LineFiles("t", [path], str)
    assert source.nbytes == path.stat().st_size
    assert len(source) == -(-source.nbytes // unit_bytes)
    assert list(all_rows(source)) == [line for line in lines if line.encode().strip()]


def test_several_files_follow_each_other_also_empty_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "UNIT_BYTES", 4)
    files = [tmp_path / name for name in "abc"]
    for file, content in zip(files, (b"1\n22\n333\n", b"", b"\xef\xbb\xbf4444\r\n5"), strict=True):
        file.write_bytes(content)
    source = LineFiles("t", files, str)
    assert list(all_rows(source)) == ["1", "22", "333", "4444", "5"]


def test_units_grow_with_the_data_so_that_their_number_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "UNIT_BYTES", 4)
    monkeypatch.setattr(rows_module, "MAX_UNITS", 10)
    (tmp_path / "rows.txt").write_text("".join(f"{i:03d}\n" for i in range(100)))
    source = LineFiles("t", [tmp_path / "rows.txt"], str)
    assert len(source) == 10
    assert list(all_rows(source)) == [f"{i:03d}" for i in range(100)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_unit_can_be_read_from_any_row_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "UNIT_BYTES", 500)
    monkeypatch.setattr(rows_module, "MAX_ROWS_AT_ONCE", 7)
    _, path = write_rows(kind, tmp_path, ROWS)
    source = json_lines("t", [path], None) if kind == "jsonl" else ParquetFiles("t", [path], None)
    assert len(source) > 2
    assert list(all_rows(source)) == ROWS
    for unit in range(len(source)):
        rows = list(source.rows(unit))
        for start in range(len(rows) + 2):
            assert list(source.rows(unit, start)) == rows[start:]


def test_a_line_without_end_is_refused_instead_of_filling_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    (tmp_path / "rows.txt").write_text("short\n" + "x" * 1000)
    with pytest.raises(DataError, match=r"rows\.txt has a line of more than 100 bytes at byte 6"):
        list(all_rows(LineFiles("t", [tmp_path / "rows.txt"], str)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"not a JSON object in one line \(Unterminated string"),
        (b'["text"]', r"a row is a JSON object such as .* not a list"),
        (b'{"other": "x"}', r"the key 'text', which holds the text, is missing"),
        (b'{"text": 3}', r"the key 'text', which holds the text, is of type int"),
        (b'{"text": "\\ud800"}', r".*surrogates not allowed"),
        (b'{"text": "Stra\xdfe"}', r"not UTF-8 text \(byte 0xdf\)\. Convert the file"),
    ],
)
def test_a_broken_line_is_named_with_its_number(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n{"text": null}\n' + line + b'\n{"text": "fine"}\n')
    source = json_lines("t", [path], None)
    with pytest.raises(DataError, match=rf"rows\.jsonl line 4: {message}") as caught:
        list(all_rows(source))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json_lines_say_so_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"text": "a"}\n]')
    with pytest.raises(DataError, match=r"rows\.json line 1: not a JSON object in one line"):
        json_lines("t", [path], None)
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"rows\.json has no rows"):
        json_lines("t", [path], None)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows read what has no permission")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(DataError, match=r"rows\.txt cannot be read \(Permission denied\)"):
        LineFiles("t", [path], str)


def test_a_file_that_is_gone_while_it_is_read_is_named(tmp_path: Path) -> None:
    _, path = write_rows("jsonl", tmp_path, ROWS)
    source = json_lines("t", [path], None)
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read \(No such file or directory\)"):
        list(all_rows(source))


# --- columns


def test_the_text_is_in_the_column_asked_for_or_in_text_or_in_the_only_one() -> None:
    assert text_column({"id": False, "body": True, "text": True}, "body", "here") == "body"
    assert text_column({"id": False, "body": True, "text": True}, None, "here") == "text"
    assert text_column({"id": False, "body": True}, None, "here") == "body"


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"a": True, "b": True, "n": False}, None, r"here: it is not clear which .* texts: a, b; others: n"),
        ({"n": False}, None, r"columns of texts: none; others: n"),
        ({"text": True}, "body", r"no column of texts is 'body' \(columns of texts: text; others: none"),
        ({"text": True, "n": False}, "n", r"no column of texts is 'n'"),
    ],
)
def test_an_unclear_column_is_an_error_that_names_them_all(
    columns: dict[str, bool], asked: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message + r".*Set data\.text_column"):
        text_column(columns, asked, "here")


def test_the_column_is_read_from_json_and_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    import pyarrow.parquet as parquet

    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "body": "one", "title": "t"}))
    assert list(all_rows(json_lines("t", [tmp_path / "rows.jsonl"], "body"))) == ["one"]
    words = pyarrow.array(["one", None, "one"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"tags": [["a"]] * 3, "body": words}), tmp_path / "rows.parquet")
    assert list(all_rows(ParquetFiles("t", [tmp_path / "rows.parquet"], None))) == ["one", "", "one"]


# --- parquet


def test_broken_parquet_is_named_with_its_row_group(tmp_path: Path) -> None:
    _, path = write_rows("parquet", tmp_path, ["x" * 500 + str(i) for i in range(200)], row_group_size=50)
    content = bytearray(path.read_bytes())
    source = ParquetFiles("t", [path], None)
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet row group [12] cannot be read \(.+\)") as caught:
        list(all_rows(source))
    assert "\n" not in str(caught.value)
    for broken in (content[: len(content) // 3], b"", b"no parquet at all"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"rows\.parquet is not a parquet file that can be read \(.+\)") as caught:
            ParquetFiles("t", [path], None)
        assert "\n" not in str(caught.value)


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    import pyarrow.parquet as parquet

    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    parquet.write_table(pyarrow.table({"text": ["a"]}), files[0])
    parquet.write_table(pyarrow.table({"body": ["b"]}), files[1])
    with pytest.raises(DataError, match=r"b\.parquet has no column of texts 'text', but .*a\.parquet has"):
        ParquetFiles("t", files, None)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r'pip install "smolcluster\[data\]"'):
        ParquetFiles("t", [tmp_path / "rows.parquet"], None)
