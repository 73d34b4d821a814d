"""Text to token ids and back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smolcluster.errors import DataError


class Tokenizer(Protocol):
    """What datasets and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    def encode(self, text: str) -> Tensor:
        """Ids of a text: (n,) int64 on CPU."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (n,); what is no valid text becomes U+FFFD."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8. No file, no training, nothing it cannot write."""

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """The text's UTF-8 bytes: (n,) int64."""
        if not text:
            return torch.empty(0, dtype=torch.int64)  # frombuffer refuses an empty buffer
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of (n,) byte values; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        DataError: it is not built in.
    """
    if spec == "bytes":
        return ByteTokenizer()
    raise DataError(
        f"data.tokenizer is {spec!r}, but only 'bytes' is built in. Tokenizers from a folder, a file or Hugging Face "
        "come in a later release with the extra hf; set data.tokenizer=bytes"
    )
