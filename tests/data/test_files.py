from pathlib import Path

import pytest
import torch

from data.text_files import numbered_rows, samples_of, write_rows
from smolcluster.data.datasets import Dataset
from smolcluster.data.files import open_rows
from smolcluster.data.rows import all_rows
from smolcluster.data.source import load_splits, open_data
from smolcluster.errors import DataError

T = 16


def samples(dataset: Dataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    inputs, targets = dataset.batch(torch.arange(len(dataset)))
    return list(zip(map(tuple, inputs.tolist()), map(tuple, targets.tolist()), strict=True))


def write_texts(folder: Path, **texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n')


def texts_of(folder: Path, dataset: str = "text") -> tuple[list[str], list[str] | None]:
    train, validation = open_rows(dataset, folder, None)
    return list(all_rows(train)), None if validation is None else list(all_rows(validation))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("by_ending", [False, True])
def test_files_of_rows_are_documents_and_one_in_ten_validates(kind: str, by_ending: bool, tmp_path: Path) -> None:
    rows = numbered_rows(100)
    dataset, path = write_rows(kind, tmp_path, rows)
    train, validation = load_splits("text" if by_ending else dataset, path=path, max_seq_len=T)
    with_text = [row for row in rows if row]
    assert samples(validation) == samples_of(with_text[1::10], T)
    assert samples(train) == samples_of([row for i, row in enumerate(with_text) if i % 10 != 1], T)


def test_a_folder_may_say_what_trains_and_what_validates(tmp_path: Path) -> None:
    write_texts(tmp_path, a="one", b="two", testimony="three")
    assert texts_of(tmp_path) == (["one", "two", "three"], None)
    write_texts(tmp_path, **{"test-00000": "never seen"})
    assert texts_of(tmp_path) == (["one", "two", "three"], ["never seen"])
    write_texts(tmp_path, dev="developed", valid_1="checked")
    assert texts_of(tmp_path) == (["one", "two", "three"], ["checked"])
    write_texts(tmp_path / "deeper", train="trained")
    assert texts_of(tmp_path) == (["trained"], ["checked"])
    train, validation = load_splits("jsonl", path=tmp_path, max_seq_len=T)
    assert (samples(train), samples(validation)) == (samples_of(["trained"], T), samples_of(["checked"], T))


def test_the_files_of_a_folder_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_texts(tmp_path, part10="c", part02="b", part01="a")
    assert texts_of(tmp_path)[0] == ["a", "b", "c"]


def test_a_folder_of_several_kinds_needs_the_kind(tmp_path: Path) -> None:
    write_texts(tmp_path, a="one")
    (tmp_path / "notes.txt").write_text("not data\n")
    with pytest.raises(DataError, match=r"has files of several kinds \(\*\.jsonl, \*\.json, \*\.txt\)"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, "jsonl")[0] == ["one"]


def test_what_is_not_there_or_of_no_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset jsonl needs a file: set data\.path"):
        open_rows("jsonl", None, None)
    with pytest.raises(DataError, match=r"data\.path .*absent cannot be read \(No such file or directory\)"):
        open_rows("jsonl", tmp_path / "absent", None)
    with pytest.raises(DataError, match=r"has no file \*\.parquet"):
        open_rows("parquet", tmp_path, None)
    write_texts(tmp_path, valid="only")
    with pytest.raises(DataError, match=r"has only files to validate on \(valid\.jsonl\)"):
        open_rows("jsonl", tmp_path, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_is_named(streaming: bool, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet", "rows.txt"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError) as caught:
            open_data("text", path=tmp_path / name, max_seq_len=T, streaming=streaming)
        assert name in str(caught.value) or "dataset text has no text" in str(caught.value)


def test_local_files_have_one_split_to_train_on(tmp_path: Path) -> None:
    write_texts(tmp_path, a="one")
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"data\.train_split is 'valid'"):
            open_data("jsonl", path=tmp_path, max_seq_len=T, train_split="valid", streaming=streaming)
