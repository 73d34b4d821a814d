"""Download a file that is known beforehand: bounded, checked, and kept whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from smolcluster.data.root import ENVIRONMENT_KEY
from smolcluster.errors import DataError
from smolcluster.hub import why_unreachable

MAX_BYTES = 16 * 2**20  # of most files here the largest has 10.8 MB
TIMEOUT = 10.0  # seconds, per read; a mirror that is silent for longer is given up


def fetch_url(url: str, max_bytes: int | None = None) -> bytes:
    """The body behind an https address; blocks.

    Args:
        url: the address.
        max_bytes: refuse a longer body. None: MAX_BYTES.

    Raises:
        OSError: it cannot be had.
    """
    import http.client
    import urllib.request  # pulls in ssl and email: 50 ms that only a download has to pay

    limit = MAX_BYTES if max_bytes is None else max_bytes
    if (reason := why_unreachable(url)) is not None:  # without a network, sooner than by TIMEOUT
        raise OSError(reason)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            body: bytes = response.read(limit + 1)
    except http.client.HTTPException as exc:  # the server broke off, or speaks no HTTP
        raise OSError(f"{type(exc).__name__}: {exc}") from exc
    if len(body) > limit:
        raise OSError(f"more than {limit} bytes")
    return body


def keep_file(content: bytes, path: Path) -> None:
    """Write under a name of its own and rename: ranks that download at the same time never see half a file.

    Raises:
        DataError: the folder cannot be written to.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as exc:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if path.is_file():
            return  # Windows refuses to replace a file that another rank, which was faster, is reading
        raise DataError(
            f"{path.name} was downloaded but cannot be written to {path.parent} ({exc}). Set {ENVIRONMENT_KEY} to a "
            "folder that you may write to"
        ) from exc
