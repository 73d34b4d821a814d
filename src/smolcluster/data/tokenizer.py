"""Text to token ids and back: bytes, or what a Hugging Face folder, file or id says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from smolcluster.errors import DataError
from smolcluster.hub import find_folder, first_line, import_extra, quiet_transformers
from smolcluster.kinds import JsonObject

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# All that a tokenizer may consist of; saved together.
FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
GPT2_END = "<|endoftext|>"


class Tokenizer(Protocol):
    """What datasets, generation and export need of a tokenizer. Methods may be called from any thread."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text; None: there is none."""
        ...

    def encode(self, text: str) -> Tensor:
        """Ids of a text: (n,) int64 on CPU, with what the tokenizer puts before a text (Llama's `<s>`)."""
        ...

    def encode_whole(self, text: str) -> Tensor:
        """Ids of a text that has everything which belongs around it: nothing is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """The same as `encode` for many texts."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (n,), without special tokens; what is no valid text becomes U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads into a folder that is there. Raises OSError."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8. No file, no training, nothing it cannot write."""

    vocab_size = 256
    eos_id = None

    def encode(self, text: str) -> Tensor:
        """The text's UTF-8 bytes: (n,) int64."""
        if not text:
            return torch.empty(0, dtype=torch.int64)  # frombuffer refuses an empty buffer
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64)

    def encode_whole(self, text: str) -> Tensor:
        """The same: nothing is ever added."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """The UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tensor) -> str:
        """The text of (n,) byte values; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """A byte-level BPE without a single merge, whose ids are the byte values."""
        by_bytes: JsonObject = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        content: JsonObject = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": by_bytes,
            "post_processor": None,
            "decoder": by_bytes,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {char: value for value, char in enumerate(_byte_characters())},
                "merges": [],
            },
        }
        (folder / TOKENIZER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _write_config(folder, "PreTrainedTokenizerFast", None)


class HFTokenizer:
    """A tokenizer of the library `tokenizers`."""

    def __init__(self, tokenizer: Any, *, eos_id: int | None, files: Sequence[Path], kind: str) -> None:
        """Take one over.

        Args:
            tokenizer: a tokenizers.Tokenizer.
            eos_id: the id that ends a text.
            files: what it came from, copied by `save`.
            kind: the class that transformers shall make of it, where no file says so.
        """
        tokenizer.no_truncation()  # some files cut every text to what their first model could read
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._files = files
        self._kind = kind
        self.eos_id = eos_id
        # Not their number: ids may have gaps.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> Tensor:
        """Ids of a text: (n,) int64, with the special tokens that the tokenizer puts around a text."""
        return self.encode_batch([text])[0]

    def encode_whole(self, text: str) -> Tensor:
        """Ids of a text: (n,) int64, with the special tokens that are written in it and no others."""
        return torch.tensor(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))  # fast: no offsets, which nobody here reads
        return [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings]

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (n,), without special tokens."""
        text: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """Copy the files that it came from, and write tokenizer.json and tokenizer_config.json where they lack."""
        for file in self._files:
            shutil.copyfile(file, folder / file.name)
        if not (folder / TOKENIZER).exists():
            (folder / TOKENIZER).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        if not (folder / TOKENIZER_CONFIG).exists():
            end = None if self.eos_id is None else self._tokenizer.id_to_token(self.eos_id)
            _write_config(folder, self._kind, end)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; blocks, perhaps for a download.

    Args:
        spec: `bytes`; a folder with a tokenizer (of GPT-2 also vocab.json and merges.txt alone); a tokenizer.json;
            or a Hugging Face id.

    Raises:
        ConfigError: there is no such folder, file or id, no network, or the extra is not installed.
        DataError: its files are damaged or of an unknown kind.
    """
    if spec == "bytes":
        return ByteTokenizer()
    # Ranks use one thread each; and a program that forks later would be warned of the library's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizers = import_extra("tokenizers", f"data.tokenizer {spec}")
    path = Path(spec).expanduser()
    if path.is_file() and path.name != TOKENIZER:
        return HFTokenizer(_read(tokenizers, path), eos_id=None, files=(), kind="PreTrainedTokenizerFast")
    if path.is_file():
        return _from_folder(tokenizers, path.parent)
    patterns = [*FILES, "config.json", "generation_config.json"]
    return _from_folder(tokenizers, find_folder(spec, key="data.tokenizer", patterns=patterns, is_whole=has_tokenizer))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer of some kind."""
    names = {file.name for file in folder.iterdir()}
    return (
        bool(names & {TOKENIZER, "tokenizer.model", "spiece.model", "vocab.txt"})
        or {"vocab.json", "merges.txt"} <= names
    )


def _from_folder(tokenizers: Any, folder: Path) -> Tokenizer:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    names = {file.name for file in files}
    if TOKENIZER in names:
        tokenizer = _read(tokenizers, folder / TOKENIZER)
        return HFTokenizer(tokenizer, eos_id=_eos_id(folder, tokenizer), files=files, kind="PreTrainedTokenizerFast")
    if names == {"vocab.json", "merges.txt"}:
        tokenizer = _gpt2(tokenizers, folder)
        return HFTokenizer(tokenizer, eos_id=tokenizer.token_to_id(GPT2_END), files=files, kind="GPT2Tokenizer")
    if not has_tokenizer(folder):
        raise DataError(
            f"data.tokenizer is {folder}, which has no {TOKENIZER}. Name a folder of a tokenizer, a {TOKENIZER}, or "
            "bytes"
        )
    return _through_transformers(folder)


def _read(tokenizers: Any, file: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as exc:
        raise DataError(
            f"{file} is no tokenizer ({first_line(exc)}). Name a {TOKENIZER}, or download it again"
        ) from exc


def _gpt2(tokenizers: Any, folder: Path) -> Any:
    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as exc:
        raise DataError(
            f"{folder} has a damaged vocab.json or merges.txt ({first_line(exc)}). Copy them again"
        ) from exc
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if tokenizer.token_to_id(GPT2_END) is not None:
        tokenizer.add_special_tokens([GPT2_END])
    return tokenizer


def _through_transformers(folder: Path) -> Tokenizer:
    """Older formats (SentencePiece, WordPiece), which transformers converts."""
    transformers = import_extra("transformers", f"data.tokenizer {folder}")
    try:
        with quiet_transformers():
            loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer = loaded.backend_tokenizer
    except Exception as exc:
        raise DataError(
            f"transformers cannot load the tokenizer in {folder} ({first_line(exc)}). Save it as {TOKENIZER} "
            "with its save_pretrained"
        ) from exc
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return HFTokenizer(tokenizer, eos_id=loaded.eos_token_id, files=files, kind="PreTrainedTokenizerFast")


def _eos_id(folder: Path, tokenizer: Any) -> int | None:
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        token = _json(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return found
    for name in ("generation_config.json", "config.json"):
        eos_id = _json(folder / name).get("eos_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
        if isinstance(eos_id, int) and tokenizer.id_to_token(eos_id) is not None:
            return eos_id
    return None


def _json(file: Path) -> JsonObject:
    """A file's object; an empty one where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{file} cannot be read (not JSON). Download or copy it again") from exc
    return content if isinstance(content, dict) else {}


def _write_config(folder: Path, kind: str, end: str | None) -> None:
    content: JsonObject = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False}
    if end is not None:
        content |= {"eos_token": end}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]
