"""Tokenizers: known ids, folders of every kind, files that transformers reads back, one line where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolcluster import hub
from smolcluster.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from smolcluster.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SMOLCLUSTER_DATA") or ROOT.parent / "shared" / "data")
STORIES, GPT2 = DATA / "stories260K-hf", DATA / "gpt2-bpe"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K-hf in SMOLCLUSTER_DATA")
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="needs gpt2-bpe in SMOLCLUSTER_DATA")
TEXTS = ["Once upon a time", "", " two  spaces\n\tand a tab", "naïve 日本 \x00 don't", "<|endoftext|>"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A word tokenizer with an end, which cuts and pads as some published ones do."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "fox": 4, "jumps": 9}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2)
    folder = tmp_path / "small"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def transformers_reads(folder: Path) -> Any:
    return pytest.importorskip("transformers", reason="needs the extra hf").AutoTokenizer.from_pretrained(folder)


# --- bytes


@given(st.text())
def test_every_text_survives_encode_and_decode(text: str) -> None:
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(text.encode("utf-8"))
    assert ByteTokenizer().decode(tokens) == text


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert ByteTokenizer().decode(torch.tensor([0x61, 0xC3, 0x62, 0xFF])) == "a\ufffdb\ufffd"


def test_the_byte_tokenizer_is_loaded_by_name_and_has_no_end() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, None)


def test_transformers_reads_bytes_as_bytes(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    theirs = transformers_reads(tmp_path)
    assert len(theirs) == 256
    for text in TEXTS:
        assert theirs.encode(text) == list(text.encode())
        assert theirs.decode(list(text.encode())) == text
    assert theirs.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    # every value, also those that are in no UTF-8
    assert theirs.convert_tokens_to_ids(theirs.convert_ids_to_tokens(range(256))) == list(range(256))


def test_what_bytes_save_loads_here_too(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.vocab_size, loaded.eos_id) == (256, None)
    assert [ids.tolist() for ids in loaded.encode_batch(TEXTS)] == [list(text.encode()) for text in TEXTS]


# --- known ids


@needs_stories
@pytest.mark.parametrize("spec", [STORIES, STORIES / "tokenizer.json"])
def test_the_ids_of_stories260k_are_known(spec: Path) -> None:
    tokenizer = load_tokenizer(str(spec))
    tokens = tokenizer.encode("Once upon a time")
    assert tokens.tolist() == [1, 403, 407, 261, 378]
    assert tokens.dtype == torch.int64
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (512, 2)
    assert tokenizer.decode(tokens) == "Once upon a time"


@needs_gpt2
def test_gpt2s_vocabulary_and_merges_are_enough() -> None:
    tokenizer = load_tokenizer(str(GPT2))
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>").tolist() == [64, 50256]


@pytest.mark.parametrize("spec", [pytest.param(STORIES, marks=needs_stories), pytest.param(GPT2, marks=needs_gpt2)])
def test_a_saved_tokenizer_is_the_same_for_transformers_and_for_us(spec: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(spec))
    tokenizer.save(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in tmp_path.iterdir()}
    theirs, again = transformers_reads(tmp_path), load_tokenizer(str(tmp_path))
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text) == ids
        assert again.encode(text).tolist() == ids


@needs_gpt2
def test_a_longer_text_than_any_model_reads_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_tokenizer(str(GPT2)).encode("word " * 5000)) > 5000


@needs_stories
def test_threads_share_a_tokenizer() -> None:
    tokenizer = load_tokenizer(str(STORIES))
    expected = tokenizer.encode(TEXTS[0] * 200).tolist()
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(tokenizer.encode(TEXTS[0] * 200).tolist())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [expected] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@needs_stories
def test_a_program_that_forks_is_not_warned() -> None:
    # As a DataLoader with workers does. In a process of its own: pytest's has threads.
    script = (
        "import os, sys\n"
        "from smolcluster.data.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer(sys.argv[1])\n"
        "tokenizer.encode_batch(['a text'] * 100)\n"
        "pid = os.fork()\n"
        "tokenizer.encode_batch(['a text'] * 100)\n"
        "os._exit(0) if pid == 0 else sys.exit(os.waitpid(pid, 0)[1])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(STORIES)],
        env={**kept, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")


# --- folders


def test_texts_are_neither_cut_nor_padded_and_ids_may_have_gaps(small: Path) -> None:
    tokenizer = load_tokenizer(str(small))
    assert tokenizer.vocab_size == 10
    assert [ids.tolist() for ids in tokenizer.encode_batch(["the fox jumps", "fox", ""])] == [[3, 4, 9], [4], []]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("generation_config.json", {"eos_token_id": [2, 1]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_the_end_is_found_wherever_the_folder_says_it(small: Path, file: str, content: dict[str, Any]) -> None:
    assert load_tokenizer(str(small)).eos_id is None
    (small / file).write_text(json.dumps(content))
    assert load_tokenizer(str(small)).eos_id == 2


def test_a_file_of_any_name_is_loaded_and_saved_under_the_usual_one(small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.json").rename(tmp_path / "my-words.json")
    tokenizer = load_tokenizer(str(tmp_path / "my-words.json"))
    assert tokenizer.encode("the fox").tolist() == [3, 4]
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save(out)
    assert {file.name for file in out.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert transformers_reads(out).encode("the fox jumps") == [3, 4, 9]


def test_an_older_format_goes_through_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nfox\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    transformers_reads(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("the fox").tolist() == [2, 5, 6, 3]
    assert tokenizer.vocab_size == 7


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no tokenizer\.json"),
        ({"config.json": "{}"}, r"has no tokenizer\.json"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is no tokenizer"),
        ({"tokenizer.json": '{"version": "1.0"}'}, r"tokenizer\.json is no tokenizer"),
        ({"vocab.json": "[]", "merges.txt": "a b"}, r"damaged vocab\.json or merges\.txt"),
        ({"tokenizer.model": "no sentencepiece"}, r"transformers cannot load the tokenizer in"),
    ],
)
def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_not_looked_for_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    monkeypatch.setattr(hub, "why_unreachable", lambda url: pytest.fail("asked the network"))
    for spec in ("./no/such", "/no/such", "~/no-such-folder", "a/b/c"):
        with pytest.raises(ConfigError, match=r"data\.tokenizer is .*no such folder"):
            load_tokenizer(spec)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'data\.tokenizer gpt2 needs tokenizers .* pip install "smolcluster\[hf\]"'):
        load_tokenizer("gpt2")


# --- ids


def with_hub(monkeypatch: pytest.MonkeyPatch, snapshot: Any, unreachable: str | None) -> None:
    class FakeHub:
        class Constants:
            ENDPOINT = "https://hub.example"
            HF_HUB_OFFLINE = False

        constants = Constants
        snapshot_download = staticmethod(snapshot)

    real = hub.import_extra
    monkeypatch.setattr(hub, "import_extra", lambda name, *a: FakeHub if name == "huggingface_hub" else real(name, *a))
    monkeypatch.setattr(hub, "why_unreachable", lambda url: unreachable)


def tokenizer_of(spec: str) -> Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    return load_tokenizer(spec)


def test_an_id_is_taken_from_the_cache_without_a_network(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, lambda name, allow_patterns, local_files_only=False: str(small), "no network")
    assert tokenizer_of("some-org/words").encode("the fox").tolist() == [3, 4]


def test_an_id_is_downloaded_when_the_cache_lacks_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert name == "some-org/words"
        if not local_files_only:
            assert not any(pattern.endswith((".py", ".bin", ".safetensors")) for pattern in allow_patterns)
            shutil.copy(small / "tokenizer.json", cache)
        return str(cache)  # the library names a folder even when it holds other files of that id only

    with_hub(monkeypatch, snapshot, None)
    assert tokenizer_of("some-org/words").encode("the fox").tolist() == [3, 4]


def test_a_missing_network_or_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        raise FileNotFoundError("404 Client Error\nand more")

    with_hub(monkeypatch, absent, "Name or service not known")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is gpt2: no folder here .* cannot be reached") as caught:
        tokenizer_of("gpt2")
    assert "\n" not in str(caught.value)
    with_hub(monkeypatch, absent, None)
    with pytest.raises(ConfigError, match=r"gpt2, which cannot be downloaded from .*404 Client Error") as caught:
        tokenizer_of("gpt2")
    assert "\n" not in str(caught.value)
