"""What all tests of the command line have in common."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _sessions_are_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = {"win32": "APPDATA", "darwin": "HOME"}.get(sys.platform, "XDG_CONFIG_HOME")
    monkeypatch.setenv(variable, str(tmp_path))
