from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.text_files import data_folder
from smolcluster.data import snli
from smolcluster.data.batch import NO_TARGET
from smolcluster.data.loader import eval_batches
from smolcluster.data.snli import Pair, encode_pairs, load_snli, read_pairs
from smolcluster.data.source import load_splits
from smolcluster.data.tokenizer import ByteTokenizer
from smolcluster.errors import DataError
from smolcluster.training.step import evaluate_batch

PAIRS = [
    Pair("A man eats.", "He eats.", "entailment"),
    Pair("A dog runs in a green field.", "It sleeps.", "contradiction"),
    Pair("Two women talk.", "They are sisters.", "neutral"),
]


def no_network(url: str, max_bytes: int) -> bytes:
    raise OSError("Name or service not known")


def stanford(pair: Pair, label: str | None = None) -> str:
    row = {"sentence1": pair.premise, "sentence2": pair.hypothesis, "gold_label": label or pair.label, "pairID": "7"}
    return json.dumps(row) + "\n"


def plain(pair: Pair) -> str:
    return json.dumps(dict(zip(("premise", "hypothesis", "label"), pair, strict=True))) + "\n"


class BytesWithEnds(ByteTokenizer):
    """Bytes with a token before each text, as Llama has, and an end."""

    vocab_size = 258
    eos_id = 257

    def encode(self, text: str) -> Tensor:
        return torch.cat([torch.tensor([256]), super().encode(text)])


def test_a_pair_is_one_padded_sample_whose_label_is_graded() -> None:
    dataset = encode_pairs(PAIRS, ByteTokenizer(), 64)
    inputs, targets = dataset.batch(torch.arange(3))
    graded = dataset.graded(torch.arange(3))
    assert graded is not None
    assert dataset.kind == "text"
    for pair, inp, target, grade in zip(PAIRS, inputs, targets, graded, strict=True):
        text = f"{pair.premise}\n{pair.hypothesis}\n{pair.label}\n".encode()
        assert bytes(inp[: len(text) - 1].tolist()) == text[:-1]
        assert bytes(target[: len(text) - 1].tolist()) == text[1:]
        assert (target[len(text) - 1 :] == NO_TARGET).all()
        assert bytes(target[grade].tolist()) == pair.label.encode()
    expected = sum(len("".join(pair)) + 2 for pair in PAIRS)
    assert dataset.targets_per_sample(torch.arange(3)) == expected == int((targets != NO_TARGET).sum())


@pytest.mark.parametrize("max_seq_len", [20, 30, 36, 44, 46])
def test_a_pair_that_is_too_long_loses_the_end_of_its_premise_and_keeps_its_label(max_seq_len: int) -> None:
    pair = PAIRS[1]
    dataset = encode_pairs([pair], ByteTokenizer(), max_seq_len)
    _, targets = dataset.batch(torch.arange(1))
    graded = dataset.graded(torch.arange(1))
    assert bytes(targets[graded].tolist()) == b"contradiction"
    inputs, _ = dataset.batch(torch.arange(1))
    premise, hypothesis = bytes(inputs[0].tolist()).decode().split("\n")[:2]
    assert pair.premise.startswith(premise)
    assert pair.hypothesis.startswith(hypothesis)
    assert (hypothesis == pair.hypothesis) or not premise
    assert len(dataset) == 1


@pytest.mark.parametrize("max_seq_len", [20, 36, 44])
def test_where_the_label_of_a_pair_stands_does_not_tell_which_it_is(max_seq_len: int) -> None:
    pairs = [PAIRS[1]._replace(label=label) for label in snli.LABELS]
    dataset = encode_pairs(pairs, ByteTokenizer(), max_seq_len)
    graded = dataset.graded(torch.arange(3))
    assert graded is not None
    assert len(set(graded.int().argmax(dim=1).tolist())) == 1


def test_a_window_without_room_for_a_label_is_refused() -> None:
    encode_pairs(PAIRS, ByteTokenizer(), 15)
    with pytest.raises(DataError, match=r"a label takes 13 tokens, but model\.max_seq_len=14 leaves 12"):
        encode_pairs(PAIRS, ByteTokenizer(), 14)


def test_special_tokens_stand_once_before_and_once_behind_the_pair() -> None:
    inputs, targets = encode_pairs(PAIRS[:1], BytesWithEnds(), 64).batch(torch.arange(1))
    text = list(b"A man eats.\nHe eats.\nentailment")
    assert inputs[0, : len(text) + 1].tolist() == [256, *text]
    assert targets[0, : len(text) + 1].tolist() == [*text, 257]


def test_the_accuracy_is_the_part_of_pairs_whose_label_is_right() -> None:
    class Knows(nn.Module):
        """Always right, but for the letters of one word."""

        def __init__(self, targets: Tensor, wrong: str) -> None:
            super().__init__()
            self.targets = targets
            self.wrong = wrong

        def forward(self, inputs: Tensor) -> Tensor:
            says = self.targets.clamp(min=0)
            for row, target in zip(says, self.targets, strict=True):
                text = bytes(target[target != NO_TARGET].tolist())
                if (start := text.find(self.wrong.encode())) >= 0:
                    row[start] = ord("?")
            return nn.functional.one_hot(says, 256).float()

    dataset = encode_pairs(PAIRS, ByteTokenizer(), 64)
    (batch,) = eval_batches(dataset, 3)
    for wrong, right in (("contradiction", 2), ("sleeps", 3)):
        sums = evaluate_batch(Knows(batch.targets, wrong), batch)
        assert (sums.correct, sums.graded) == (right, 3)


def test_pairs_without_a_label_are_left_out_and_both_forms_of_rows_are_read(tmp_path: Path) -> None:
    rows = [stanford(PAIRS[0]), stanford(PAIRS[1], "-"), plain(PAIRS[2])]
    (tmp_path / "dev.jsonl").write_text("".join(rows))
    assert read_pairs(tmp_path / "dev.jsonl") == [PAIRS[0], PAIRS[2]]


@pytest.mark.parametrize("row", ['{"premise": "a"}', '{"premise": "a", "hypothesis": "b", "label": "maybe"}', "[]"])
def test_a_row_that_is_no_pair_is_named(row: str, tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text(plain(PAIRS[0]) + row)
    with pytest.raises(DataError, match=r"dev\.jsonl line 2: a row "):
        read_pairs(tmp_path / "dev.jsonl")


def test_what_validates_depends_on_the_files_that_are_there(tmp_path: Path) -> None:
    def sizes(train_split: str) -> tuple[int, int]:
        train, validation = load_snli(tmp_path, train_split, ByteTokenizer(), 64, no_network)
        return len(train), len(validation)

    (tmp_path / "dev.jsonl").write_text("".join(plain(PAIRS[i % 3]) for i in range(20)))
    assert sizes("dev") == (18, 2)  # a tenth is held out
    (tmp_path / "snli_1.0_test.jsonl").write_text("".join(stanford(PAIRS[i % 3]) for i in range(5)))
    assert sizes("dev") == (20, 5)
    assert sizes("test") == (5, 20)
    (tmp_path / "snli_1.0_train.jsonl").write_text("".join(stanford(PAIRS[i % 3]) for i in range(7)))
    assert sizes("train") == (7, 20)
    (tmp_path / "dev.jsonl").write_text("")
    with pytest.raises(DataError, match=r"dev\.jsonl has too few pairs with a label"):
        sizes("train")


def test_without_the_train_file_and_a_network_the_error_names_both_ways_out(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text(plain(PAIRS[0]))
    with pytest.raises(DataError) as caught:
        load_snli(tmp_path, "train", ByteTokenizer(), 64, no_network)
    assert f"train.jsonl is not in {tmp_path}" in str(caught.value)
    assert "data.train_split to a split that is there (dev)" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.train_split is 'valid', but snli has train, dev, test"):
        load_snli(tmp_path, "valid", ByteTokenizer(), 64, no_network)


def test_the_archive_is_downloaded_checked_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"snli_1.0/snli_1.0_{split}.jsonl", stanford(PAIRS[0]))
        archive.writestr("snli_1.0/README.txt", "not wanted")
    content = packed.getvalue()
    with pytest.raises(DataError, match=r"not the known archive \(sha256 differs\)"):
        load_snli(tmp_path, "train", ByteTokenizer(), 64, lambda url, most: content)
    monkeypatch.setattr(snli, "SHA256", hashlib.sha256(content).hexdigest())
    train, validation = load_snli(tmp_path, "train", ByteTokenizer(), 64, lambda url, most: content)
    assert (len(train), len(validation)) == (1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"snli_1.0_{split}.jsonl" for split in ("dev", "test", "train")
    ]


def test_the_real_pairs_are_read() -> None:
    root = data_folder()
    if root is None or not (root / "snli" / "dev.jsonl").is_file():
        pytest.skip("no snli/dev.jsonl in SMOLCLUSTER_DATA or ../shared/data")
    train, validation = load_splits("snli", max_seq_len=128, train_split="dev", root=root)
    assert (len(train), len(validation)) == (9842 - 985, 985)
    graded = validation.graded(torch.arange(985))
    assert graded is not None
    targets = validation.batch(torch.arange(985))[1]
    answers = {bytes(row[grade].tolist()).decode() for row, grade in zip(targets, graded, strict=True)}
    assert answers == {"entailment", "neutral", "contradiction"}
    fixture = read_pairs(root / "snli" / "fixture_snli.jsonl")
    assert {pair.label for pair in fixture} == {"entailment", "neutral", "contradiction"}
