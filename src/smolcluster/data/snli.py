"""SNLI as language modelling: a premise, a hypothesis, and the word that says how they relate.

A sample is one pair, three lines and the tokenizer's end (none: a line break):

    A man inspects the uniform of a figure.
    The man is sleeping.
    contradiction

The model learns to write all of it; the accuracy is that of the label: a pair is right if every token of its label is.

Source    Bowman, Angeli, Potts, Manning 2015, A large annotated corpus for learning natural language inference
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from smolcluster.data.datasets import Dataset, WindowsDataset
from smolcluster.data.documents import ENCODED_AT_ONCE, bare, end_of_text, is_held_out, special_tokens
from smolcluster.data.download import fetch_url, keep_file
from smolcluster.data.root import ENVIRONMENT_KEY
from smolcluster.data.rows import LineFiles, all_rows
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
LABELS = ("entailment", "neutral", "contradiction")
NO_LABEL = "-"  # the annotators did not agree
URL = "https://nlp.stanford.edu/projects/snli/snli_1.0.zip"
SHA256 = "afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e"
MAX_BYTES = 100 * 2**20  # the archive has 94.6 MB


class Pair(NamedTuple):
    """One row."""

    premise: str
    hypothesis: str
    label: str


def load_snli(
    folder: Path,
    train_split: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    fetch: Callable[[str, int], bytes] = fetch_url,
) -> tuple[Dataset, Dataset]:
    """The split to train on and the one to validate on; blocks.

    What validates is dev, else test, each if its file is there and it is not trained on, else a tenth of the pairs.

    Args:
        folder: where {train,dev,test}.jsonl or snli_1.0_{train,dev,test}.jsonl are, or shall be.
        train_split: `data.train_split`: train, dev or test.
        tokenizer: makes tokens of the texts.
        max_seq_len: tokens of a window.
        fetch: gives the bytes behind an address, so many at most; raises OSError.

    Raises:
        DataError: no such split, or a file is neither there nor to be had, or a row is no pair.
    """
    if train_split not in SPLITS:
        raise DataError(f"data.train_split is {train_split!r}, but snli has {', '.join(SPLITS)}. Choose one")
    train_file = _find(folder, train_split)
    if train_file is None:
        _download(folder, train_split, fetch)
        train_file = folder / _file_name(train_split)
    others = (_find(folder, split) for split in ("dev", "test") if split != train_split)
    pairs = read_pairs(train_file)
    if (held_out_file := next((file for file in others if file), None)) is not None:
        held_out = read_pairs(held_out_file)
    else:
        held_out = [pair for number, pair in enumerate(pairs) if is_held_out(number)]
        pairs = [pair for number, pair in enumerate(pairs) if not is_held_out(number)]
    for part, file in ((pairs, train_file), (held_out, held_out_file or train_file)):
        if not part:
            raise DataError(f"{file} has too few pairs with a label to train and validate on. Replace the file")
    return encode_pairs(pairs, tokenizer, max_seq_len), encode_pairs(held_out, tokenizer, max_seq_len)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs that have a label, in the order of the file.

    Raises:
        DataError: the file cannot be read, or a row is no pair.
    """
    pairs: list[Pair] = []

    def parse(line: str) -> str:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"a row is a JSON object, not a {type(row).__name__}")
        # The keys of Stanford's files, and those of the copies that have no parses.
        found = [row.get(key, row.get(other)) for key, other in _KEYS]
        if found[2] == NO_LABEL:
            return ""
        if not all(isinstance(text, str) for text in found) or found[2] not in LABELS:
            raise ValueError(
                f"a row has sentence1, sentence2 and gold_label (or premise, hypothesis and label: {', '.join(LABELS)})"
            )
        pairs.append(Pair(*map(str, found)))
        return ""

    for _ in all_rows(LineFiles("snli", [path], parse)):
        pass
    return pairs


_KEYS = (("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label"))


def encode_pairs(pairs: list[Pair], tokenizer: Tokenizer, max_seq_len: int) -> WindowsDataset:
    """Each pair as a document of at most max_seq_len + 1 tokens, and which of them are its label.

    Where a pair is longer the premise loses its end, and if that is not enough the hypothesis too: as much whatever the
    label is, since a model could otherwise tell the label from where it stands.

    Raises:
        DataError: not even a label fits.
    """
    special = special_tokens(tokenizer)
    labels = {label: bare(tokenizer.encode(label), special) for label in LABELS}
    line_break = bare(tokenizer.encode("\n"), special)
    end = end_of_text(tokenizer)
    room = max_seq_len + 1 - len(special[0]) - 2 * len(line_break) - len(end)
    longest = max(len(label) for label in labels.values())
    if room < longest:
        raise DataError(
            f"dataset snli: a label takes {longest} tokens, but model.max_seq_len={max_seq_len} leaves {room} for it. "
            "Set model.max_seq_len to 128 or so"
        )
    parts: list[Tensor] = []
    lengths: list[int] = []
    answers: list[tuple[int, int]] = []
    for premise, hypothesis, label in _encoded(pairs, tokenizer):
        answer = labels[label]
        hypothesis = bare(hypothesis, special)[: room - longest]
        premise = bare(premise, special)[: room - longest - len(hypothesis)]
        pieces = (special[0], premise, line_break, hypothesis, line_break, answer, end)
        parts += pieces
        lengths.append(sum(len(piece) for piece in pieces))
        answers.append((lengths[-1] - len(end) - len(answer), lengths[-1] - len(end)))
    return WindowsDataset(
        "snli",
        torch.cat(parts),
        torch.tensor(lengths),
        max_seq_len,
        tokenizer.vocab_size,
        torch.tensor(answers),
    )


def _encoded(pairs: list[Pair], tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor, str]]:
    for start in range(0, len(pairs), ENCODED_AT_ONCE):
        part = pairs[start : start + ENCODED_AT_ONCE]
        premises = tokenizer.encode_batch([pair.premise for pair in part])
        hypotheses = tokenizer.encode_batch([pair.hypothesis for pair in part])
        yield from zip(premises, hypotheses, (pair.label for pair in part), strict=True)


def _file_name(split: str) -> str:
    return f"snli_1.0_{split}.jsonl"


def _find(folder: Path, split: str) -> Path | None:
    return next((path for name in (f"{split}.jsonl", _file_name(split)) if (path := folder / name).is_file()), None)


def _download(folder: Path, split: str, fetch: Callable[[str, int], bytes]) -> None:
    """All three files, out of Stanford's archive."""
    problem = "it is not the known archive (sha256 differs)"
    try:
        packed = fetch(URL, MAX_BYTES)
    except OSError as exc:
        problem = str(exc)
    else:
        if hashlib.sha256(packed).hexdigest() == SHA256:
            with zipfile.ZipFile(io.BytesIO(packed)) as archive:
                for name in map(_file_name, SPLITS):
                    keep_file(archive.read(f"snli_1.0/{name}"), folder / name)
            logger.info("downloaded folder=%s from=%s bytes=%d", folder, URL, len(packed))
            return
    there = [other for other in SPLITS if _find(folder, other)]
    raise DataError(
        f"snli: {split}.jsonl is not in {folder} and could not be downloaded from {URL} ({problem}). Put train.jsonl, "
        f"dev.jsonl and test.jsonl there, set {ENVIRONMENT_KEY} to a folder that holds snli/, or set data.train_split "
        f"to a split that is there ({', '.join(there) or 'none is'})"
    )
