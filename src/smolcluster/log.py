"""Logging set-up for programs. Libraries only call `logging.getLogger(__name__)`."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"


def log_to_file(path: Path, level: int = logging.INFO) -> logging.Handler:
    """Append this process's smolcluster log to `path`; returns the handler, which the caller closes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("smolcluster")
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler


class _LogFile(logging.FileHandler):
    """On a full disk lines are lost: what needs the disk says so, once, and not the log with a traceback each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Nothing."""

    def close(self) -> None:
        """Close the file; what it did not take is given up."""
        with contextlib.suppress(OSError):
            super().close()
