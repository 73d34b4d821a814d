import gzip
import pydoc_data.topics
import struct
import sys
from pathlib import Path

import pytest
import torch

from data.text_files import data_folder, everything, text_of
from smolcluster.data.datasets import ClassesDataset, Dataset, TextDataset
from smolcluster.data.pydoc_text import pydoc_texts
from smolcluster.data.source import load_splits, open_data
from smolcluster.errors import ConfigError, DataError

# --- classes


def small_classes() -> ClassesDataset:
    pixels = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)
    return ClassesDataset("small", pixels, torch.arange(6) % 3, 3, divisor=255.0, mean=0.25, std=0.5)


def test_a_batch_gathers_and_normalises_the_samples_asked_for() -> None:
    dataset = small_classes()
    inputs, targets = dataset.batch(torch.tensor([5, 0, 5]))
    expected = torch.stack([(torch.arange(4.0).view(1, 2, 2) + 4 * i) / 255 for i in (5, 0, 5)])
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, (expected - 0.25) / 0.5, rtol=0, atol=1e-7)  # one rounding of float32
    assert targets.dtype == torch.int64
    assert targets.tolist() == [2, 0, 2]
    assert dataset.inputs.flatten().tolist() == list(range(24))  # a batch is a copy


def test_a_batch_without_samples_keeps_its_shape() -> None:
    inputs, targets = small_classes().batch(torch.empty(0, dtype=torch.int64))
    assert (inputs.shape, targets.shape) == ((0, 1, 2, 2), (0,))
    dataset = TextDataset("t", torch.arange(20), 4, 256)
    inputs, targets = dataset.batch(torch.empty(0, dtype=torch.int64))
    assert (inputs.shape, targets.shape) == ((0, 4), (0, 4))


def test_a_dataset_says_what_a_model_for_it_needs() -> None:
    classes: Dataset = small_classes()
    text: Dataset = TextDataset("t", torch.arange(20), 4, 256)
    assert (classes.kind, classes.num_classes, classes.vocab_size, classes.input_dim) == ("classes", 3, None, 4)
    assert (text.kind, text.num_classes, text.vocab_size, text.input_dim) == ("text", None, 256, 4)
    assert (len(classes), len(text)) == (6, 4)


def test_targets_are_counted_per_sample_and_per_token() -> None:
    for dataset in (small_classes(), TextDataset("t", torch.arange(20), 4, 256)):
        for indices in (torch.tensor([3, 1]), torch.empty(0, dtype=torch.int64)):
            assert dataset.targets_per_sample(indices) == dataset.batch(indices)[1].numel()


def test_digits_are_all_there_split_four_to_one_and_scaled() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra data")
    train, validation = load_splits("digits")
    assert (len(train), len(validation)) == (1437, 360)
    assert (train.kind, train.num_classes, train.input_dim, train.name) == ("classes", 10, 64, "digits")
    images = torch.cat([everything(train)[0], everything(validation)[0]])
    assert images.shape == (1797, 1, 8, 8)
    source = sklearn_datasets.load_digits()
    ours = sorted(map(tuple, (images.flatten(1) * 16).int().tolist()))
    assert ours == sorted(map(tuple, source.data.astype(int).tolist()))
    assert (images.min(), images.max()) == (0.0, 1.0)
    labels = {tuple(image): label for image, label in zip(source.data.astype(int).tolist(), source.target, strict=True)}
    inputs, targets = everything(validation)
    for image, label in zip((inputs.flatten(1) * 16).int().tolist(), targets.tolist(), strict=True):
        assert labels[tuple(image)] == label
    assert everything(train)[1].tolist() != source.target[:1437].tolist()  # shuffled before the split


def test_the_digits_split_is_always_the_same() -> None:
    pytest.importorskip("sklearn.datasets", reason="needs the extra data")
    first, second = load_splits("digits")[1], load_splits("digits")[1]
    assert torch.equal(everything(first)[0], everything(second)[0])


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'pip install "smolcluster\[data\]"'):
        load_splits("digits")


def test_real_mnist_has_its_known_numbers() -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("no mnist/train-images-idx3-ubyte.gz in SMOLCLUSTER_DATA or ../shared/data")
    train, validation = load_splits("mnist", root=folder)
    assert (len(train), len(validation), train.num_classes, train.input_dim) == (60000, 10000, 10, 784)
    inputs, targets = train.batch(torch.arange(60000))
    assert inputs.shape == (60000, 1, 28, 28)
    # 0.1307 and 0.3081 are the training images' own mean and deviation, to four digits
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3
    assert targets[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert validation.batch(torch.arange(8))[1].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]


def test_mnist_trains_on_train_and_validates_on_t10k_with_its_own_normalisation(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count, pixel in (("train", 3, 255), ("t10k", 2, 0)):
        images = b"\0\0\x08\x03" + struct.pack(">3I", count, 28, 28) + bytes([pixel]) * (count * 784)
        labels = b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(range(count))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    train, validation = load_splits("mnist", root=tmp_path)
    inputs, targets = everything(train)
    assert targets.tolist() == [0, 1, 2]
    # float32 rounds three times
    torch.testing.assert_close(inputs, torch.full((3, 1, 28, 28), (1 - 0.1307) / 0.3081), rtol=1e-6, atol=0)
    inputs, targets = everything(validation)
    assert targets.tolist() == [0, 1]
    torch.testing.assert_close(inputs, torch.full((2, 1, 28, 28), -0.1307 / 0.3081), rtol=1e-6, atol=0)


def test_mnist_is_looked_for_in_the_data_folder_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    monkeypatch.setenv("SMOLCLUSTER_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_splits("mnist")
    assert str(folder / "train-images-idx3-ubyte.gz") in str(caught.value)


# --- text


def test_a_folder_that_nobody_may_look_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:  # as in a folder of mode 000, which root may look into all the same
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    with pytest.raises(DataError, match=r"dataset mnist: .*train-images.* cannot be read \(Permission denied\)"):
        open_data("mnist", root=tmp_path)


def test_windows_are_full_do_not_overlap_and_predict_the_next_token() -> None:
    dataset = TextDataset("t", torch.arange(100, 112), max_seq_len=4, vocab_size=256)
    inputs, targets = dataset.batch(torch.tensor([1, 0]))
    assert inputs.tolist() == [[104, 105, 106, 107], [100, 101, 102, 103]]
    assert targets.tolist() == [[105, 106, 107, 108], [101, 102, 103, 104]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert len(dataset) == 2  # 12 tokens: a third window would need a 13th as its last target
    assert len(TextDataset("t", torch.arange(13), 4, 256)) == 3


def test_a_text_without_a_full_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 4 tokens, but one window needs model\.max_seq_len \+ 1 = 5"):
        TextDataset("t", torch.arange(4), 4, 256)


def test_the_last_tenth_of_a_text_file_validates(tmp_path: Path) -> None:
    text = "".join(f"{i:03d}" for i in range(67)) + "\r\n"  # 203 bytes: 50 windows of 4 and a rest
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    train, validation = load_splits("text", path=path, max_seq_len=4)
    assert (len(train), len(validation)) == (45, 5)
    assert text_of(train) == text[:181]  # the last target is the first token that is held out
    assert text_of(validation) == text[180:201]
    assert train.vocab_size == 256
    short_train, short_validation = load_splits("text", path=path, max_seq_len=101)
    assert (len(short_train), len(short_validation)) == (1, 1)
    with pytest.raises(DataError, match=r"has 203 tokens, but .* need 205"):
        load_splits("text", path=path, max_seq_len=102)


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfab\r\ncd\r\nef\r\n")
    train, validation = load_splits("text", path=path, max_seq_len=2)
    assert text_of(train)[:-1] + text_of(validation) == "ab\r\ncd\r\nef\r"


def test_a_text_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data\.path"):
        load_splits("text", max_seq_len=4)
    with pytest.raises(DataError, match=r"absent\.txt cannot be read"):
        load_splits("text", path=tmp_path / "absent.txt", max_seq_len=4)
    path = tmp_path / "latin.txt"
    path.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 4 is 0xdf\)"):
        load_splits("text", path=path, max_seq_len=2)


@pytest.mark.parametrize("name", ["text", "pydoc"])
def test_a_text_needs_the_tokenizer_and_the_window_length(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.max_seq_len"):
        load_splits(name, path=tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("0123456789")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is \./absent"):
        load_splits(name, path=tmp_path / "t.txt", max_seq_len=4, tokenizer="./absent")


def test_an_unknown_split_is_an_error_that_names_the_known_one() -> None:
    with pytest.raises(DataError, match=r"data\.train_split is 'valid'.*'train'"):
        load_splits("digits", train_split="valid")


# --- pydoc


def test_pydoc_is_english_text_of_a_useful_length() -> None:
    train, validation = load_splits("pydoc", max_seq_len=128)
    assert (train.name, train.kind, train.vocab_size) == ("pydoc", "text", 256)
    assert len(train) * 128 > 250_000
    assert 0.05 < len(validation) / len(train) < 0.2
    assert " the " in text_of(validation)
    assert torch.equal(everything(train)[0], everything(load_splits("pydoc", max_seq_len=128)[0])[0])


def test_held_out_text_of_pydoc_does_not_occur_in_training() -> None:
    train, validation = pydoc_texts(pydoc_data.topics.topics)
    flat = " " + " ".join(train.split()) + " "
    paragraphs = validation.split("\n\n")
    assert len(paragraphs) > 50
    assert not [paragraph for paragraph in paragraphs if f" {' '.join(paragraph.split())} " in flat]
    length = 8
    shared = [
        run
        for paragraph in paragraphs
        for words in [paragraph.split()]
        for start in range(len(words) - length + 1)
        for run in [" ".join(words[start : start + length])]
        if f" {run} " in flat
    ]
    assert shared == []


def test_the_order_of_topics_does_not_matter() -> None:
    topics = pydoc_data.topics.topics
    assert pydoc_texts(dict(reversed(topics.items()))) == pydoc_texts(topics)


def test_every_tenth_block_is_held_out_and_repeated_paragraphs_appear_once() -> None:
    long = "x" * 4100
    topics = {f"{i:02d}": f"paragraph {i} {i}{long}\n\n  paragraph {i}\n  {i}{long}" for i in range(20)}
    train, validation = pydoc_texts(topics)
    assert [part.split()[1] for part in validation.split("\n\n")] == ["9", "19"]
    assert [part.split()[1] for part in train.split("\n\n")] == [str(i) for i in range(20) if i % 10 != 9]


def test_held_out_paragraphs_that_share_a_sentence_with_the_training_text_are_left_out() -> None:
    fill = "x" * 4100
    topics = {f"{i:02d}": f"text {i} {i}{fill}" for i in range(9)}
    topics["00"] += "\n\nthis is a sentence of exactly nine words here"
    topics["09"] = "\n\n".join(
        [
            "before it this is a sentence of exactly\n  nine words too",  # eight words in a row
            "words here",  # short, and all of it occurs
            "this is a sentence of exactly nine, almost",
        ]
    )
    assert pydoc_texts(topics)[1] == "this is a sentence of exactly nine, almost"


def test_pydoc_without_its_module_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data.*data\.dataset=text"):
        load_splits("pydoc", max_seq_len=8)
