"""WikiText-2: three files of tokenised Wikipedia articles, each read as one long text.

Source    Merity, Xiong, Bradbury, Socher 2016, Pointer Sentinel Mixture Models, arXiv:1609.07843
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from smolcluster.data.datasets import Dataset, TextDataset
from smolcluster.data.download import fetch_url, keep_file
from smolcluster.data.files import read_text
from smolcluster.data.root import ENVIRONMENT_KEY
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
# The commit is pinned: what is there never changes.
MIRROR = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
    "word_language_model/data/wikitext-2/"
)
SHA1 = {
    "train.txt": "863f29c46ef9d167fff4940ec821195882fe29d1",
    "valid.txt": "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
    "test.txt": "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
}


def load_wikitext2(
    folder: Path,
    train_split: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    fetch: Callable[[str], bytes] = fetch_url,
) -> tuple[Dataset, Dataset]:
    """The split to train on and the one to validate on: valid, or test where valid is trained on; blocks.

    Args:
        folder: where train.txt, valid.txt and test.txt are, or shall be.
        train_split: `data.train_split`: train, valid or test.
        tokenizer: makes tokens of the text.
        max_seq_len: tokens of a window.
        fetch: gives the bytes behind an address; raises OSError.

    Raises:
        DataError: no such split, or a file is neither there nor to be had, or is no text.
    """
    if train_split not in SPLITS:
        raise DataError(f"data.train_split is {train_split!r}, but wikitext2 has {', '.join(SPLITS)}. Choose one")
    splits = (train_split, "test" if train_split == "valid" else "valid")
    files = [folder / f"{split}.txt" for split in splits]
    for file in files:
        if not file.is_file():
            _download(file, fetch)
    train, validation = (
        TextDataset("wikitext2", tokenizer.encode(read_text(file)), max_seq_len, tokenizer.vocab_size) for file in files
    )
    return train, validation


def _download(path: Path, fetch: Callable[[str], bytes]) -> None:
    problem = "it is not the known file (sha1 differs)"
    try:
        content = fetch(MIRROR + path.name)
    except OSError as exc:
        problem = str(exc)
    else:
        if hashlib.sha1(content, usedforsecurity=False).hexdigest() == SHA1[path.name]:
            keep_file(content, path)
            logger.info("downloaded file=%s from=%s bytes=%d", path, MIRROR, len(content))
            return
    there = [split for split in SPLITS if path.with_name(f"{split}.txt").is_file()]
    raise DataError(
        f"wikitext2: {path.name} is not in {path.parent} and could not be downloaded ({problem}). Put train.txt, "
        f"valid.txt and test.txt there, set {ENVIRONMENT_KEY} to a folder that holds wikitext-2/, or set "
        f"data.train_split to a split that is there ({', '.join(there) or 'none is'})"
    )
