from pathlib import Path

import pytest

from smolcluster.data.root import data_root


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in ("SMOLCLUSTER_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_the_environment_variable_wins_and_may_begin_with_the_home_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SMOLCLUSTER_DATA", "some/folder")
    assert data_root() == Path("some/folder")
    monkeypatch.setenv("SMOLCLUSTER_DATA", str(Path("~") / "sets"))
    assert data_root() == Path("~/sets").expanduser()
    assert "~" not in str(data_root())


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux", ".cache/smolcluster"),
        ("darwin", "Library/Caches/smolcluster"),
        ("win32", "AppData/Local/smolcluster/data"),
    ],
)
def test_the_default_is_the_platforms_cache_folder(
    monkeypatch: pytest.MonkeyPatch, home: Path, platform: str, expected: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert data_root() == home / expected


def test_the_platforms_own_variables_move_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data_root() == tmp_path / "xdg" / "smolcluster"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data_root() == tmp_path / "local" / "smolcluster" / "data"
