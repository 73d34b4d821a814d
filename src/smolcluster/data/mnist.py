"""MNIST's four files: find them, or download and check them, and read their idx format.

Source    LeCun, Bottou, Bengio, Haffner 1998, Gradient-based learning applied to document recognition
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smolcluster.data.download import fetch_url, keep_file
from smolcluster.data.root import ENVIRONMENT_KEY
from smolcluster.errors import DataError

logger = logging.getLogger(__name__)

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Of the unpacked bytes: mirrors and other copies differ in how they were compressed.
UNPACKED_SHA256 = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MAX_UNPACKED_BYTES = 64 * 2**20  # the largest has 47 MB; a file that unpacks to more is not MNIST
UNSIGNED_BYTE = 8  # idx's code for the only element type that MNIST has


def read_mnist(part: str, folder: Path, fetch: Callable[[str], bytes] = fetch_url) -> tuple[Tensor, Tensor]:
    """Images and labels of one part, from `folder`, into which missing files are downloaded; blocks.

    Args:
        part: "train" (60000 images) or "t10k" (10000).
        folder: where the *-ubyte.gz files are, or shall be.
        fetch: gives the bytes behind an address; raises OSError.

    Returns:
        Images (N, 28, 28) uint8 and labels (N,) int64.

    Raises:
        DataError: a file is neither there nor to be had, or damaged.
    """
    images_path = folder / f"{part}-images-idx3-ubyte.gz"
    labels_path = folder / f"{part}-labels-idx1-ubyte.gz"
    images = _read_idx(_find(images_path, fetch), images_path, dims=3)
    labels = _read_idx(_find(labels_path, fetch), labels_path, dims=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path.name} has {len(images)} images, but {labels_path.name} has {len(labels)} labels, in "
            f"{folder}. Delete both files: they are then downloaded again"
        )
    return images, labels.to(torch.int64)


def _find(path: Path, fetch: Callable[[str], bytes]) -> bytes:
    """The unpacked bytes of a file that is there, or of its download, which is kept at `path`."""
    if path.is_file():
        try:
            return _unpack(path.read_bytes())
        except (OSError, EOFError, zlib.error) as exc:
            raise DataError(
                f"{path} cannot be read as a gzip file ({exc}). Delete it: it is then downloaded again"
            ) from exc
    failures = []
    for mirror in MIRRORS:
        try:
            packed = fetch(mirror + path.name)
            unpacked = _unpack(packed)
        except (OSError, EOFError, zlib.error) as exc:
            failures.append(f"{mirror}: {exc}")
            continue
        if hashlib.sha256(unpacked).hexdigest() != UNPACKED_SHA256[path.name]:
            failures.append(f"{mirror}: not the known file (sha256 differs)")
            continue
        keep_file(packed, path)
        logger.info("downloaded file=%s from=%s bytes=%d", path, mirror, len(packed))
        return unpacked
    raise DataError(
        f"mnist: {path.name} is not in {path.parent} and could not be downloaded ({'; '.join(failures)}). Put MNIST's "
        f"four *-ubyte.gz files there, or set {ENVIRONMENT_KEY} to a folder that holds mnist/*-ubyte.gz"
    )


def _unpack(packed: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        unpacked = file.read(MAX_UNPACKED_BYTES + 1)
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise OSError(f"unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    return unpacked


def _read_idx(unpacked: bytes, path: Path, dims: int) -> Tensor:
    """The array in an idx file: two zero bytes, type, number of dims, the dims as big-endian uint32, values."""
    header_bytes = 4 + 4 * dims
    if len(unpacked) >= header_bytes and unpacked[:4] == bytes((0, 0, UNSIGNED_BYTE, dims)):
        shape = np.frombuffer(unpacked[4:header_bytes], dtype=">u4").astype(np.int64)
        if int(np.prod(shape)) == len(unpacked) - header_bytes:
            values = np.frombuffer(unpacked, dtype=np.uint8, offset=header_bytes)
            return torch.from_numpy(values.reshape(tuple(shape)).copy())  # the buffer itself is read-only
    raise DataError(
        f"{path} is not an idx file of unsigned bytes with {dims} dims and all its values ({len(unpacked)} bytes "
        "unpacked). Delete it: it is then downloaded again"
    )
