import hashlib
from pathlib import Path

import pytest
import torch

from data.text_files import data_folder, text_of
from smolcluster.data import wikitext
from smolcluster.data.source import load_splits
from smolcluster.data.tokenizer import ByteTokenizer
from smolcluster.data.wikitext import MIRROR, SHA1, load_wikitext2
from smolcluster.errors import DataError

TEXTS = {split: f" = {split} = \n" * 30 for split in ("train", "valid", "test")}


def no_network(url: str) -> bytes:
    raise OSError("Name or service not known")


def write_splits(folder: Path, *splits: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split in splits:
        (folder / f"{split}.txt").write_bytes(TEXTS[split].encode())
    return folder


@pytest.mark.parametrize(("train", "validation"), [("train", "valid"), ("valid", "test"), ("test", "valid")])
def test_it_trains_on_the_split_asked_for_and_validates_on_another(train: str, validation: str, tmp_path: Path) -> None:
    folder = write_splits(tmp_path, *TEXTS)
    splits = load_wikitext2(folder, train, ByteTokenizer(), 8, no_network)
    for dataset, split in zip(splits, (train, validation), strict=True):
        text = TEXTS[split]
        assert text_of(dataset) == text[: (len(text) - 1) // 8 * 8 + 1]
        assert (dataset.name, dataset.kind, dataset.vocab_size) == ("wikitext2", "text", 256)


def test_without_the_train_file_and_a_network_the_error_names_both_ways_out(tmp_path: Path) -> None:
    folder = write_splits(tmp_path / "wikitext-2", "valid", "test")
    with pytest.raises(DataError) as caught:
        load_wikitext2(folder, "train", ByteTokenizer(), 8, no_network)
    message = str(caught.value)
    assert "\n" not in message
    assert f"train.txt is not in {folder}" in message
    assert "Name or service not known" in message
    assert "set data.train_split to a split that is there (valid, test)" in message
    with pytest.raises(DataError, match=r"data\.train_split is 'dev', but wikitext2 has train, valid, test"):
        load_wikitext2(folder, "dev", ByteTokenizer(), 8, no_network)


def test_missing_files_are_downloaded_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {MIRROR + f"{split}.txt": text.encode() for split, text in TEXTS.items()}
    with pytest.raises(DataError, match=r"train\.txt .* not the known file \(sha1 differs\)"):
        load_wikitext2(tmp_path, "train", ByteTokenizer(), 8, served.__getitem__)
    assert list(tmp_path.iterdir()) == []
    for split, text in TEXTS.items():
        monkeypatch.setitem(wikitext.SHA1, f"{split}.txt", hashlib.sha1(text.encode()).hexdigest())
    train, _ = load_wikitext2(tmp_path, "train", ByteTokenizer(), 8, served.__getitem__)
    assert text_of(train).startswith(" = train = \n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "valid.txt"]
    again, _ = load_wikitext2(tmp_path, "train", ByteTokenizer(), 8, no_network)
    assert text_of(again) == text_of(train)


def test_the_real_files_are_the_known_ones() -> None:
    root = data_folder()
    if root is None or not (root / "wikitext-2" / "valid.txt").is_file():
        pytest.skip("no wikitext-2/valid.txt in SMOLCLUSTER_DATA or ../shared/data")
    for name in ("valid.txt", "test.txt"):
        assert hashlib.sha1((root / "wikitext-2" / name).read_bytes()).hexdigest() == SHA1[name]
    train, validation = load_splits("wikitext2", max_seq_len=128, train_split="valid", root=root)
    assert (len(train), len(validation)) == (1121681 // 128, 1256449 // 128)
    assert "Homarus gammarus" in ByteTokenizer().decode(train.batch(torch.arange(1))[0][0])
