"""The folder that datasets are looked for in and downloaded to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENVIRONMENT_KEY = "SMOLCLUSTER_DATA"


def data_root() -> Path:
    """`$SMOLCLUSTER_DATA`, else `smolcluster` in the user's cache folder as the platform has it. It may not exist."""
    chosen = os.environ.get(ENVIRONMENT_KEY)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "smolcluster" / "data"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smolcluster"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "smolcluster"
