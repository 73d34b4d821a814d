import gzip
import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch

from smolcluster.data import download, mnist
from smolcluster.data.mnist import MIRRORS, UNPACKED_SHA256, read_mnist
from smolcluster.errors import DataError

FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
IMAGES = bytes(range(24))  # 2 images of 3 x 4
LABELS = bytes([7, 3])


def idx(values: bytes, *dims: int) -> bytes:
    return bytes([0, 0, 8, len(dims)]) + struct.pack(f">{len(dims)}I", *dims) + values


UNPACKED = dict(zip(FILES, (idx(IMAGES, 2, 3, 4), idx(LABELS, 2)), strict=True))


class FakeMirrors:
    """Serves small files by address; everything else cannot be reached."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []

    def __call__(self, url: str) -> bytes:
        self.asked.append(url)
        if url not in self.files:
            raise OSError("unreachable")
        return self.files[url]


@pytest.fixture
def small_known_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, unpacked in UNPACKED.items():
        monkeypatch.setitem(UNPACKED_SHA256, name, hashlib.sha256(unpacked).hexdigest())


def write_files(folder: Path, **replaced: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, unpacked in UNPACKED.items():
        kind = "images" if "images" in name else "labels"
        (folder / name).write_bytes(gzip.compress(replaced.get(kind, unpacked)))


def check_parts(images: torch.Tensor, labels: torch.Tensor) -> None:
    assert images.dtype == torch.uint8
    assert images.tolist() == torch.arange(24).view(2, 3, 4).tolist()
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 3]


def test_files_in_the_folder_are_read_without_asking_a_mirror(tmp_path: Path) -> None:
    write_files(tmp_path)
    mirrors = FakeMirrors({})
    check_parts(*read_mnist("t10k", tmp_path, mirrors))
    assert mirrors.asked == []


@pytest.mark.usefixtures("small_known_files")
def test_missing_files_are_downloaded_checked_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    served = {MIRRORS[0] + name: gzip.compress(unpacked) for name, unpacked in UNPACKED.items()}
    check_parts(*read_mnist("t10k", folder, FakeMirrors(served)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)  # and no temporary file
    check_parts(*read_mnist("t10k", folder, FakeMirrors({})))


@pytest.mark.usefixtures("small_known_files")
def test_the_next_mirror_is_asked_when_one_is_down_or_serves_something_else(tmp_path: Path) -> None:
    other = idx(bytes(24), 2, 3, 4)
    served = {
        MIRRORS[0] + FILES[0]: gzip.compress(other),  # a well-formed file, but not the known one
        **{MIRRORS[1] + name: gzip.compress(unpacked) for name, unpacked in UNPACKED.items()},
    }
    mirrors = FakeMirrors(served)
    check_parts(*read_mnist("t10k", tmp_path, mirrors))
    assert mirrors.asked == [mirror + name for name in FILES for mirror in MIRRORS]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "unreachable"),
        (gzip.compress(idx(bytes(24), 2, 3, 4)), "sha256 differs"),
        (b"<html>not here</html>", "Not a gzipped file"),
        (gzip.compress(UNPACKED[FILES[0]])[:-12], "ended before"),
    ],
)
def test_offline_the_error_names_file_folder_and_variable(tmp_path: Path, body: bytes | None, reason: str) -> None:
    served = {} if body is None else {mirror + FILES[0]: body for mirror in MIRRORS}
    with pytest.raises(DataError) as caught:
        read_mnist("t10k", tmp_path, FakeMirrors(served))
    message = str(caught.value)
    for part in (FILES[0], str(tmp_path), "SMOLCLUSTER_DATA", reason, *MIRRORS):
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_known_files")
def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "mnist"
    served = {MIRRORS[0] + name: gzip.compress(unpacked) for name, unpacked in UNPACKED.items()}
    with pytest.raises(DataError, match=r"cannot be written to .*mnist.*SMOLCLUSTER_DATA"):
        read_mnist("t10k", folder, FakeMirrors(served))


@pytest.mark.usefixtures("small_known_files")
def test_a_file_that_a_faster_rank_wrote_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        target.write_bytes(Path(source).read_bytes())  # the faster rank
        raise PermissionError("in use")  # as Windows does

    monkeypatch.setattr(os, "replace", refuse)
    served = {MIRRORS[0] + name: gzip.compress(unpacked) for name, unpacked in UNPACKED.items()}
    check_parts(*read_mnist("t10k", tmp_path, FakeMirrors(served)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    "images",
    [
        b"",
        idx(IMAGES[:-1], 2, 3, 4),
        idx(IMAGES + b"x", 2, 3, 4),
        idx(IMAGES, 24),
        b"\0\0\x0d" + UNPACKED[FILES[0]][3:],
        b"\0\0\x08\x03\xff\xff",
    ],
    ids=["empty", "one value short", "one too many", "one dim", "floats", "half a header"],
)
def test_a_damaged_idx_file_is_an_error_that_names_it(tmp_path: Path, images: bytes) -> None:
    write_files(tmp_path, images=images)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is not an idx file.*Delete it"):
        read_mnist("t10k", tmp_path, FakeMirrors({}))


def test_a_damaged_gzip_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / FILES[1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read as a gzip file"):
        read_mnist("t10k", tmp_path, FakeMirrors({}))


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "MAX_UNPACKED_BYTES", 1000)
    write_files(tmp_path, images=bytes(100_000))
    with pytest.raises(DataError, match="more than 1000 bytes"):
        read_mnist("t10k", tmp_path, FakeMirrors({}))


def test_images_and_labels_that_differ_in_number_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, labels=idx(bytes(3), 3))
    with pytest.raises(DataError, match=r"has 2 images, but .* has 3 labels"):
        read_mnist("t10k", tmp_path, FakeMirrors({}))


def test_the_download_is_bounded_and_without_a_network_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        def __enter__(self) -> "Response":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def read(self, count: int) -> bytes:
            return bytes(count)

    asked = []

    def urlopen(url: str, timeout: float) -> Response:
        asked.append((url, timeout))
        return Response()

    reasons = [None, "Temporary failure in name resolution"]
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(download, "why_unreachable", lambda url: reasons.pop(0))
    monkeypatch.setattr(download, "MAX_BYTES", 10)
    with pytest.raises(OSError, match="more than 10 bytes"):
        download.fetch_url("https://example.invalid/file")
    with pytest.raises(OSError, match="Temporary failure in name resolution"):
        download.fetch_url("https://example.invalid/file")
    assert asked == [("https://example.invalid/file", download.TIMEOUT)]


def test_mirrors_are_asked_over_https() -> None:
    assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in MIRRORS)
