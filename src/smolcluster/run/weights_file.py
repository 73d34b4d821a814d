"""Published weights as a file of this machine: downloaded from an https address, and what its SHA-256 is.

A download is whole or not at all: it is written under a name of its own, checked, and renamed. What is no safetensors
file is refused, whatever it is called: Python pickles can execute anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

from safetensors import SafetensorError, safe_open

from smolcluster.data.download import keep_file
from smolcluster.data.root import ENVIRONMENT_KEY
from smolcluster.errors import ConfigError, DataError

# Seconds without a byte after which an address is given up.
TIMEOUT = 20.0
# Of what is read and written at a time: below 256 KiB the calls show, above it nothing is gained.
_PIECE_BYTES = 1 << 20
# Of a file beside the weights. A tokenizer.json of 256 000 tokens has 33 MB.
MAX_SMALL_BYTES = 64 << 20


class HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]  # as urllib's
        """The request that follows; an error where it would not be encrypted."""
        if not newurl.lower().startswith("https://"):
            fp.close()
            raise urllib.error.URLError(f"it redirects to {shown_url(newurl)}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def https_opener() -> urllib.request.OpenerDirector:
    """What opens https addresses and nothing else: no http, no files. Proxies are the environment's."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        HttpsRedirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "smolcluster")]
    return opener


class Checksums:
    """SHA-256 of files, remembered by size and time of change: gpt2 takes a Raspberry Pi 5 s to read and hash, each
    start anew. Who can write both the file and the records can write anything, so they are no weaker than the file."""

    def __init__(self, records: Path) -> None:
        """`records`: the file that remembers; where it cannot be written, nothing is remembered."""
        self._records = records

    def of(self, file: Path) -> str:
        """The checksum in hexadecimal; blocks while it reads the file, if that is new or has changed.

        Raises:
            OSError: the file cannot be read.
        """
        entry = self._read().get(str(file.resolve()))
        if isinstance(entry, list) and len(entry) == 3 and entry[:2] == _state(file) and isinstance(entry[2], str):
            return entry[2]
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while piece := content.read(_PIECE_BYTES):
                digest.update(piece)
        self.note(file, digest.hexdigest())
        return digest.hexdigest()

    def note(self, file: Path, sha256: str) -> None:
        """Remember a checksum that was computed while the file was written."""
        records = {**self._read(), str(file.resolve()): [*_state(file), sha256]}
        with contextlib.suppress(DataError):
            keep_file(json.dumps(records, indent=1).encode(), self._records)

    def _read(self) -> dict[str, object]:
        try:
            records = json.loads(self._records.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return records if isinstance(records, dict) else {}


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def check_sha256(file: Path, wanted: str, checksums: Checksums, where: str) -> None:
    """Compare a file with its published checksum; blocks while it reads the file for the first time.

    Args:
        file: it.
        wanted: SHA-256 in lower-case hexadecimal.
        checksums: what is known.
        where: the entry with `wanted`, for the message.

    Raises:
        ConfigError: it is another file.
    """
    try:
        found = checksums.of(file)
    except OSError as exc:
        raise ConfigError(
            f"{file} cannot be read ({exc.strerror or exc}). Delete it, so that it is downloaded"
        ) from exc
    if found != wanted:
        raise _other_file(str(file), wanted, found, where, "Delete it, so that it is downloaded again")


def _other_file(name: str, wanted: str, found: str, where: str, repair: str) -> ConfigError:
    return ConfigError(
        f"{name} is not the file that was published: its sha256 is {found}, {where} wants {wanted}. {repair}, or "
        "correct sha256 there"
    )


def fetch_weights(
    url: str,
    path: Path,
    *,
    sha256: str | None,
    where: str,
    checksums: Checksums,
    say: Callable[[str], None],
    opener: urllib.request.OpenerDirector | None = None,
) -> None:
    """Have the safetensors file of an address at a path: what is there already stays. Blocks, perhaps for a download.

    Args:
        url: the address.
        path: of the file; its folder is made.
        sha256: it must have; None: not checked.
        where: the entry that says so, for messages.
        checksums: what is known of files.
        say: is told what is downloaded, and how large it is.
        opener: what opens the address; None: https_opener.

    Raises:
        ConfigError: it cannot be had, or is another file.
    """
    with contextlib.suppress(OSError):
        if path.is_file() and (sha256 is None or checksums.of(path) == sha256):
            return
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            found = _download(url, file, path.parent, say, opener or https_opener())
        if sha256 is not None and found != sha256:
            raise _other_file(shown_url(url), sha256, found, where, "Try again")
        _refuse_other_formats(temporary, url)
        os.replace(temporary, path)
    except OSError as exc:
        raise ConfigError(
            f"{shown_url(url)} cannot be written to {path.parent} ({exc.strerror or exc}). Make room there, or set "
            f"{ENVIRONMENT_KEY} to a folder that you may write to"
        ) from exc
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    checksums.note(path, found)


def fetch_small(url: str, opener: urllib.request.OpenerDirector | None = None) -> bytes | None:
    """What is at an address, such as a tokenizer; None: there is nothing. Blocks.

    Raises:
        ConfigError: it cannot be had, or is larger than MAX_SMALL_BYTES.
    """
    try:
        with (opener or https_opener()).open(url, timeout=TIMEOUT) as response:
            body: bytes = response.read(MAX_SMALL_BYTES + 1)
    except urllib.error.HTTPError as exc:
        with exc:
            if exc.code in (403, 404, 410):  # 403: what storage services answer where they list no files
                return None
            raise _cannot_be_had(url, exc) from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise _cannot_be_had(url, exc) from exc
    if len(body) > MAX_SMALL_BYTES:
        raise ConfigError(f"{shown_url(url)} has more than {_megabytes(MAX_SMALL_BYTES)}. Set serving.hf_model_name")
    return body


def shown_url(url: str) -> str:
    """An address for a message: without a password or a signature, which may stand in it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _download(
    url: str, file: BinaryIO, folder: Path, say: Callable[[str], None], opener: urllib.request.OpenerDirector
) -> str:
    """Write what is at the address to the file; its SHA-256."""
    digest, received = hashlib.sha256(), 0
    try:
        response = opener.open(url, timeout=TIMEOUT)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        if isinstance(exc, urllib.error.HTTPError):
            exc.close()
        raise _cannot_be_had(url, exc) from exc
    with response:
        told = response.headers.get("Content-Length")
        length = int(told) if told is not None and told.isdecimal() else None
        if length is not None and length > shutil.disk_usage(folder).free:
            raise ConfigError(
                f"{shown_url(url)} has {_megabytes(length)}, for which {folder} has no room. Make room there, or set "
                f"{ENVIRONMENT_KEY} to another folder"
            )
        say(f"downloading {shown_url(url)}, {'of unknown size' if length is None else _megabytes(length)}")
        while True:
            try:
                piece = response.read(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as exc:
                raise _cannot_be_had(url, exc, received) from exc
            if not piece:
                break
            file.write(piece)
            digest.update(piece)
            received += len(piece)
    if length is not None and received != length:
        raise _cannot_be_had(url, OSError(f"it broke off, {length} bytes were told"), received)
    return digest.hexdigest()


def _cannot_be_had(url: str, error: Exception, received: int = 0) -> ConfigError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    if isinstance(error, urllib.error.HTTPError):
        reason = f"{error.code} {error.reason}"
    after = f" after {received} bytes" if received else ""
    return ConfigError(
        f"{shown_url(url)} cannot be downloaded{after} ({reason or type(error).__name__}). Check the address and the "
        "network, or name a local folder"
    )


def _refuse_other_formats(file: str, url: str) -> None:
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as exc:
        raise ConfigError(
            f"{shown_url(url)} is no safetensors file ({exc}); others, such as Python pickles, are never loaded. Name "
            "the address of a model.safetensors"
        ) from exc


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
