"""The file with the conversations."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import threading
from pathlib import Path

import pytest

from smolcluster.config.schema import ServingConfig
from smolcluster.errors import ConfigError
from smolcluster.run.serve import sessions_file
from smolcluster.serving.sessions import SessionStore, StoreFailed

ASKED = [("user", "Once upon a time")]


def told(store: SessionStore, session: str = "s", owner: str = "") -> list[tuple[str, str, str | None]] | None:
    messages = store.messages(owner, session)
    return messages and [(message.role, message.content, message.finish_reason) for message in messages]


def test_a_turn_is_stored_and_the_next_one_follows_it(tmp_path: Path) -> None:
    with SessionStore(tmp_path / "file.sqlite") as store:
        turn = store.begin("", "s", ASKED, "r1")
        assert told(store) == [("user", "Once upon a time", None), ("assistant", "", None)]
        store.save(turn, "there")
        assert told(store) == [("user", "Once upon a time", None), ("assistant", "there", None)]
        store.end(turn, "there was", "stop")
        store.save(turn, "there")  # a write that was late
        store.end(store.begin("", "s", [("user", "And?")], "r2"), "No.", "length")
    with SessionStore(tmp_path / "file.sqlite") as store:
        messages = store.messages("", "s")
        assert messages is not None
        assert [(message.number, message.content) for message in messages] == [
            (1, "Once upon a time"),
            (2, "there was"),
            (3, "And?"),
            (4, "No."),
        ]
        assert [message.request_id for message in messages] == [None, "r1", None, "r2"]


def test_messages_that_replace_a_conversation_change_its_title() -> None:
    with SessionStore() as store:
        store.end(store.begin("", "s", ASKED, "r1"), "x", "stop")
        store.begin("", "s", [("system", "Be brief"), ("user", "y" * 100)], "r2", replaces=True)
        assert told(store) == [("system", "Be brief", None), ("user", "y" * 100, None), ("assistant", "", None)]
        (summary,) = store.sessions("", 10)
        assert (summary.title, summary.count) == ("y" * 60, 3)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_turn_that_is_undone_was_never_there(replaces: bool) -> None:
    with SessionStore() as store:
        store.undo(store.begin("", "s", ASKED, "r1", replaces=replaces))
        assert store.messages("", "s") is None
        store.end(store.begin("", "s", ASKED, "r1"), "x", "stop")
        before = store.messages("", "s"), store.sessions("", 10)
        store.undo(store.begin("", "s", [("user", "z")], "r2", replaces=replaces))
        assert (store.messages("", "s"), store.sessions("", 10)) == before


def test_an_answer_that_was_cut_is_marked_and_its_true_end_wins(tmp_path: Path) -> None:
    """The true end comes where another server of this machine opened the file meanwhile."""
    file = tmp_path / "file.sqlite"
    with SessionStore(file) as first:
        turn = first.begin("", "s", [("user", "a"), ("assistant", "b"), ("user", "c")], "r1", replaces=True)
        first.save(turn, "part")
        with SessionStore(file) as second:
            marked = told(second)
            assert marked is not None
            assert [reason for _, _, reason in marked] == [None, None, None, "interrupted"]
            assert marked[-1][1] == "part"
            first.end(turn, "part and rest", "stop")
            assert (told(second) or [])[-1] == ("assistant", "part and rest", "stop")


def test_an_owner_sees_its_own_sessions_only() -> None:
    with SessionStore() as store:
        store.begin("a", "s", ASKED, "r1")
        assert store.messages("b", "s") is None
        assert store.sessions("b", 10) == []
        assert store.delete("b", "s") is False
        store.begin("b", "s", [("user", "mine")], "r1")
        assert (told(store, owner="a") or [])[0][1] == "Once upon a time"
        assert store.delete("a", "s") is True
        assert store.messages("a", "s") is None
        assert (told(store, owner="b") or [])[0][1] == "mine"


def test_sessions_come_newest_first_and_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)  # a clock that stands still
    with SessionStore() as store:
        turns = [store.begin("", f"s{number}", [("user", str(number))], "r") for number in range(5)]
        store.end(turns[1], "x", "stop")
        first = store.sessions("", 3)
        assert [summary.id for summary in first] == ["s1", "s4", "s3"]
        assert [summary.id for summary in store.sessions("", 3, first[-1].updated)] == ["s2", "s0"]


def test_the_file_and_its_folder_are_for_their_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.sqlite"
    with SessionStore(file) as store:
        store.begin("", "s", ASKED, "r1")
        if os.name == "posix":
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
            assert {stat.S_IMODE(found.stat().st_mode) for found in file.parent.iterdir()} == {0o600}
    assert [found.name for found in file.parent.iterdir()] == ["file.sqlite"]


def _text(file: Path) -> None:
    file.write_text("a letter to my bank, and no database\n" * 100, encoding="utf-8")


def _foreign(file: Path) -> None:
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()


def _newer(file: Path) -> None:
    SessionStore(file).close()
    db = sqlite3.connect(file)
    db.execute("PRAGMA user_version = 7")
    db.close()


def _folder(file: Path) -> None:
    file.mkdir()


def _below_a_file(file: Path) -> None:
    file.parent.rmdir()
    file.parent.write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_text, "not a database"),
        (_foreign, "another program's"),
        (_newer, "of version 7"),
        (_folder, "cannot be written"),
        (_below_a_file, "cannot be written"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_left_as_it_is(tmp_path: Path, make: object, says: str) -> None:
    file = tmp_path / "folder" / "file.sqlite"
    file.parent.mkdir()
    assert callable(make)
    make(file)
    before = file.read_bytes() if file.is_file() else b""
    with pytest.raises(ConfigError, match=says) as found:
        SessionStore(file)
    assert str(file) in str(found.value)
    assert (file.read_bytes() if file.is_file() else b"") == before


def test_many_threads_may_write_at_once(tmp_path: Path) -> None:
    with SessionStore(tmp_path / "file.sqlite") as store:

        def talk(number: int) -> None:
            for turn in range(10):
                store.end(store.begin("", f"s{number}", [("user", str(turn))], f"r{turn}"), "x", "stop")

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [summary.count for summary in store.sessions("", 10)] == [20] * 6


def test_a_closed_store_says_so() -> None:
    store = SessionStore()
    store.close()
    store.close()
    with pytest.raises(StoreFailed, match="closed"):
        store.messages("", "s")


def test_each_model_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("APPDATA", str(tmp_path))
    named = ["gpt2", "a/b", "a_b", "..", "../../etc/passwd", "模" * 90, "模" * 91, "a b:c"]
    files = [sessions_file(ServingConfig(), name) for name in named]
    assert len({str(file).lower() for file in files}) == len(named)
    assert len({file.parent for file in files}) == 1
    assert all(len(file.name.encode()) < 256 for file in files)
    assert files[0].name == "gpt2.sqlite"
    if sys.platform != "darwin":
        assert files[0].parent == tmp_path / "smolcluster" / "sessions"
    assert sessions_file(ServingConfig(sessions_file="~/x.sqlite"), "gpt2") == Path.home() / "x.sqlite"
