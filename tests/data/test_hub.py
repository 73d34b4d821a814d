"""Hugging Face datasets, out of local folders: there is no network in tests."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.text_files import everything, numbered_rows, samples_of
from smolcluster.data import hub
from smolcluster.data.datasets import Dataset
from smolcluster.data.source import load_splits, open_data
from smolcluster.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs the extra hf")

T = 16
ROWS = numbered_rows(50)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_split(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def samples(dataset: Dataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    inputs, targets = everything(dataset)
    return list(zip(map(tuple, inputs.tolist()), map(tuple, targets.tolist()), strict=True))


def test_a_folder_is_loaded_with_its_validation_split(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "train", [{"text": row, "id": i} for i, row in enumerate(ROWS)])
    write_split(folder, "validation", [{"text": "held out", "id": 1}])
    write_split(folder, "test", [{"text": "never seen", "id": 2}])
    for streaming in (False, True):
        data = open_data(str(folder), max_seq_len=T, streaming=streaming)
        assert samples(data.validation) == samples_of(["held out"], T)
        assert data.vocab_size == 256
        assert data.steps_per_epoch(1) == len(samples_of(ROWS, T))
    train, validation = load_splits(str(folder), max_seq_len=T, train_split="test")
    assert (samples(train), samples(validation)) == (samples_of(["never seen"], T), samples_of(["held out"], T))


def test_without_a_validation_split_one_in_ten_rows_validates(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "train", [{"body": row, "id": i} for i, row in enumerate(ROWS)])
    train, validation = load_splits(str(folder), max_seq_len=T)
    with_text = [row for row in ROWS if row]
    assert samples(validation) == samples_of(with_text[1::10], T)
    assert len(train) + len(validation) == len(samples_of(ROWS, T))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_column_and_the_split_are_checked(streaming: bool, tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "train", [{"premise": "a", "hypothesis": "b", "label": 1}] * 3)
    with pytest.raises(DataError, match=r"columns of texts: premise, hypothesis; others: label.*data\.text_column"):
        open_data(str(folder), max_seq_len=T, streaming=streaming)
    data = open_data(str(folder), max_seq_len=T, streaming=streaming, text_column="hypothesis")
    assert samples(data.validation) == samples_of(["b"], T)
    with pytest.raises(DataError, match=r"data\.train_split is 'dev', but dataset .* has the splits train"):
        open_data(str(folder), max_seq_len=T, streaming=streaming, train_split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_one_clear_line(streaming: bool, tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "train", [{"text": row} for row in ROWS])
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "cut o')
    with pytest.raises(DataError, match=r"dataset .* cannot be loaded from Hugging Face \(.+\)") as caught:
        open_data(str(folder), max_seq_len=T, streaming=streaming).steps_per_epoch(1)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_error_comes_at_once_and_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: object, **_options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_data("roneneldan/TinyStories", max_seq_len=T)
    assert time.monotonic() - started < 10  # the library's own retries take 23 s
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'roneneldan/TinyStories'", "wikitext2", "huggingface.co", "HF_HUB_OFFLINE=1", "data.path"):
        assert part in message


@pytest.mark.parametrize(
    ("dataset", "asked"),
    [
        ("roneneldan/TinyStories", ("roneneldan/TinyStories", None)),
        ("Salesforce/wikitext:wikitext-2-raw-v1", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
    ],
)
def test_an_id_may_name_a_configuration(
    dataset: str, asked: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((*arguments, options))
        rows = {"text": [f"row {i}" for i in range(20)]}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "why_unreachable", lambda url: None)
    train, _ = load_splits(dataset, max_seq_len=T)
    assert calls == [(*asked, {"streaming": False})]
    assert len(train) == 18


def test_what_the_library_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "why_unreachable", lambda url: None)
    with pytest.raises(DataError, match=r"\(RuntimeError: Dataset scripts are no longer supported\)\. Check its name"):
        open_data("org/old", max_seq_len=T)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'mnits': not built in \(mnist, .*pip install \"smolcluster\[hf\]\""):
        open_data("mnits", max_seq_len=T)
