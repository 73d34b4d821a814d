"""What all tests of the command line have in common."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _sessions_are_not_the_users(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = {"win32": "APPDATA", "darwin": "HOME"}.get(sys.platform, "XDG_CONFIG_HOME")
    monkeypatch.setenv(variable, str(tmp_path_factory.mktemp("home")))
