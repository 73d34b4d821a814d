"""Logging set-up for programs. Libraries only call `logging.getLogger(__name__)`."""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"


def log_to_file(path: Path, level: int = logging.INFO) -> logging.Handler:
    """Append this process's smolcluster log to `path`; returns the handler, which the caller closes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("smolcluster")
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler
