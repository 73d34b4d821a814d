"""Texts to documents: tokens with an end, cut into windows; and which documents are held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from smolcluster.data.datasets import WindowsDataset
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import DataError

ENCODED_AT_ONCE = 64  # texts: tokens are eight bytes wide until they are put together
HELD_OUT_EVERY = 10  # of documents without a validation split, one in ten validates


def is_held_out(number: int) -> bool:
    """Whether document `number`, counted from 0, validates: the second of every ten, so that two are enough."""
    return number % HELD_OUT_EVERY == 1


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Texts as documents: their tokens and then the tokenizer's end, or a line break where it has none.

    Args:
        texts: read once; only a few at a time are kept as text.
        tokenizer: makes tokens of them.

    Returns:
        Tokens of all documents one behind the other, (n,) of the smallest type that holds the vocabulary, and the
        tokens of each, (documents,) int64.
    """
    dtype = torch.uint8 if tokenizer.vocab_size <= 256 else torch.int32
    end = end_of_text(tokenizer)
    if torch.equal(special_tokens(tokenizer)[1][-1:], end):  # the tokenizer puts it there
        end = end[:0]
    tokens, lengths = [torch.empty(0, dtype=dtype)], []
    remaining = iter(texts)
    while part := list(islice(remaining, ENCODED_AT_ONCE)):
        documents = tokenizer.encode_batch(part)
        lengths += [len(document) + len(end) for document in documents]
        tokens.append(torch.cat([piece for document in documents for piece in (document, end)]).to(dtype))
    return torch.cat(tokens), torch.tensor(lengths, dtype=torch.int64)


def special_tokens(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """What a tokenizer puts before a text and behind it: (n,) int64 each, most often nothing or one token."""
    empty, letter = tokenizer.encode(""), tokenizer.encode("a")
    shorter = min(len(empty), len(letter))
    before = int((empty[:shorter] == letter[:shorter]).cumprod(0).sum())
    return empty[:before], empty[before:]


def bare(tokens: Tensor, special: tuple[Tensor, Tensor]) -> Tensor:
    """A text's tokens without those that the tokenizer put before and behind it."""
    before, after = special
    return tokens[len(before) : len(tokens) - len(after)]


def end_of_text(tokenizer: Tokenizer) -> Tensor:
    """What ends a document: the tokenizer's end, or a line break where it has none; (n,) int64."""
    if tokenizer.eos_id is None:
        return bare(tokenizer.encode("\n"), special_tokens(tokenizer))
    return torch.tensor([tokenizer.eos_id])


def windows_of(name: str, texts: Iterable[str], tokenizer: Tokenizer, max_seq_len: int) -> WindowsDataset:
    """Texts as documents in memory; blocks until all are read.

    Args:
        name: for messages and the run's configuration.
        texts: read once; only a few at a time are kept as text.
        tokenizer: makes tokens of them.
        max_seq_len: tokens of a window.
    """
    return WindowsDataset(name, *encode_documents(texts, tokenizer), max_seq_len, tokenizer.vocab_size)


def first_windows(name: str, texts: Iterable[str], tokenizer: Tokenizer, max_seq_len: int, most: int) -> WindowsDataset:
    """The same of so many texts as give `most` windows; the rest is not read."""

    def enough() -> Iterator[str]:
        missing = most
        for text in texts:
            if missing <= 0:
                return
            missing -= count_windows(text, tokenizer, max_seq_len)
            yield text

    windows = windows_of(name, enough(), tokenizer, max_seq_len)
    windows.keep_first(most)  # the last text may be long
    return windows


def count_windows(text: str, tokenizer: Tokenizer, max_seq_len: int) -> int:
    """Windows of a text as a document, or one less."""
    return -(-len(tokenizer.encode(text)) // max_seq_len)


def split_documents(
    name: str, read: Callable[[], Iterable[str]], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[WindowsDataset, WindowsDataset]:
    """Documents without a validation split: one in ten validates; blocks.

    Args:
        name: for messages and the run's configuration.
        read: begins to read the texts; called twice.
        tokenizer: makes tokens of them.
        max_seq_len: tokens of a window.

    Raises:
        DataError: there are not two texts.
    """
    train, validation = (
        windows_of(
            name,
            (text for number, text in enumerate(with_text(read())) if is_held_out(number) == held_out),
            tokenizer,
            max_seq_len,
        )
        for held_out in (False, True)
    )
    check_splits(name, train, validation)
    return train, validation


def check_splits(name: str, train: WindowsDataset, validation: WindowsDataset) -> None:
    """Raise DataError if one of the splits has no sample."""
    if not len(train):
        raise DataError(f"dataset {name} has no text to train on: no row, or only empty ones. Choose other data")
    if not len(validation):
        raise DataError(f"dataset {name} has no text to validate on: it takes two rows at least. Choose other data")


def with_text(texts: Iterable[str]) -> Iterator[str]:
    """The texts that are more than white space: only they become documents."""
    return (text for text in texts if text.strip())
