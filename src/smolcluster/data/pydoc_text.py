"""Python's own documentation as English text that needs no download, split so that nothing occurs on both sides."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from smolcluster.data.datasets import Dataset, TextDataset
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import DataError

# Blocks long enough to read as text, many enough (90) that both sides have every kind of it.
PYDOC_BLOCK_CHARS = 4096
PYDOC_HELD_OUT = 10  # every tenth block
PYDOC_SHARED_WORDS = 8  # shorter runs recur in any English text; longer ones are a sentence that was copied


def load_pydoc(tokenizer: Tokenizer, max_seq_len: int) -> tuple[Dataset, Dataset]:
    """Training and validation split; blocks.

    Raises:
        DataError: this Python came without its documentation.
    """
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as exc:
        raise DataError(
            "dataset pydoc needs Python's own documentation (module pydoc_data), which this Python was installed "
            "without. Use data.dataset=text with data.path, or a complete Python"
        ) from exc
    train, validation = (
        TextDataset("pydoc", tokenizer.encode(text), max_seq_len, tokenizer.vocab_size) for text in pydoc_texts(topics)
    )
    return train, validation


def pydoc_texts(topics: Mapping[str, str]) -> tuple[str, str]:
    """Python's help topics as (training text, held-out text), without text that occurs in both.

    The topics repeat each other: whole paragraphs, and paragraphs that differ in a word. Repeated paragraphs are
    left out; of the held-out ones also those that share PYDOC_SHARED_WORDS words in a row with the training text.

    Args:
        topics: text by topic; their order does not matter.
    """
    blocks: list[list[str]] = []
    block_chars = PYDOC_BLOCK_CHARS
    for paragraph in _distinct_paragraphs(topics):
        if block_chars >= PYDOC_BLOCK_CHARS:
            blocks.append([])
            block_chars = 0
        blocks[-1].append(paragraph)
        block_chars += len(paragraph) + 2
    parts: tuple[list[str], list[str]] = ([], [])
    for index, block in enumerate(blocks):
        parts[index % PYDOC_HELD_OUT == PYDOC_HELD_OUT - 1].extend(block)
    train = "\n\n".join(parts[0])
    trained = {length: set(_runs(train, length)) for length in range(1, PYDOC_SHARED_WORDS + 1)}
    held_out = [
        paragraph
        for paragraph in parts[1]
        # A shorter paragraph counts as one run.
        for length in (min(PYDOC_SHARED_WORDS, len(paragraph.split())),)
        if trained[length].isdisjoint(_runs(paragraph, length))
    ]
    return train, "\n\n".join(held_out)


def _distinct_paragraphs(topics: Mapping[str, str]) -> list[str]:
    """All paragraphs in the order of their topics' names, each once whatever its indentation."""
    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    paragraphs.pop("", None)
    return list(paragraphs.values())


def _runs(text: str, length: int) -> Iterator[str]:
    """All runs of `length` words, with one blank between them."""
    words = text.split()
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
