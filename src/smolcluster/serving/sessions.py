"""Conversations in a file: SQLite, so that whatever was committed is there after SIGKILL.

Methods block for as long as the disk takes, so an event loop calls them with `asyncio.to_thread`. There is one
connection and a lock around it. Several servers of one machine may have the same file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolcluster.errors import ConfigError, ServingError

VERSION = 1
INTERRUPTED = "interrupted"
TITLE_CHARACTERS = 60
# Marks the file as ours: "smol".
_APPLICATION = 0x736D6F6C
# Another server may write to the file at the moment.
_BUSY_SECONDS = 5.0
# Least time between two changes of one owner's sessions, so that each has a time of its own; a float of today's
# seconds can tell 0.24 microseconds apart.
_TICK = 1e-6
_SCHEMA = (
    """CREATE TABLE sessions (
        key INTEGER PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, title TEXT NOT NULL,
        created REAL NOT NULL, updated REAL NOT NULL, UNIQUE (owner, id))""",
    "CREATE INDEX newest ON sessions (owner, updated)",
    """CREATE TABLE messages (
        session INTEGER NOT NULL REFERENCES sessions (key) ON DELETE CASCADE, number INTEGER NOT NULL,
        role TEXT NOT NULL, content TEXT NOT NULL, created REAL NOT NULL, finish_reason TEXT, request_id TEXT,
        PRIMARY KEY (session, number))""",
    "CREATE INDEX unfinished ON messages (session) WHERE finish_reason IS NULL AND request_id IS NOT NULL",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
_INSERT = "INSERT INTO messages (session, number, role, content, created, finish_reason, request_id) VALUES"
_COLUMNS = "number, role, content, created, finish_reason, request_id"


class StoreFailed(ServingError):
    """A conversation could not be read or written."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message of a conversation.

    Attributes:
        number: its place, from 1.
        role, content: as in a prompt.
        created: seconds since 1970.
        finish_reason: why an answer ended; None: it has not, or this is no answer.
        request_id: of the request that it answers.
    """

    number: int
    role: str
    content: str
    created: float
    finish_reason: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list.

    Attributes:
        id: what its owner calls it.
        title: how it begins.
        updated: when its newest message came or ended; no two of an owner's are alike.
        count: messages.
    """

    id: str
    title: str
    updated: float
    count: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A question that was stored, and the place of its answer.

    Attributes:
        session: the row of its session.
        answer: the number of the answer's message.
        request_id: of both.
        first: the number of the first message that is new.
        replaced: messages that gave way to it.
        before: title and time of the session before; None: it is new.
    """

    session: int
    answer: int
    request_id: str
    first: int
    replaced: Sequence[StoredMessage]
    before: tuple[str, float] | None


class SessionStore:
    """The conversations in one file, each with the owner that made it. Its methods may be called from any thread."""

    def __init__(self, file: Path | None = None) -> None:
        """Open the file, make it if there is none, and mark the answers that a killed server left.

        Args:
            file: where; None: in memory, until it is closed.

        Raises:
            ConfigError: it cannot be written, is no file of ours, or a newer version's.
        """
        self._name = "the sessions in memory" if file is None else str(file)
        self._lock = threading.Lock()
        self._is_closed = False
        if file is not None:
            _make_file(file)
        try:
            self._db = sqlite3.connect(
                ":memory:" if file is None else file,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as exc:
            raise _refusal(self._name, f"cannot be opened ({exc})") from exc
        try:
            self._prepare()
        except sqlite3.Error as exc:
            self._db.close()
            raise _refusal(self._name, f"cannot be used ({exc})") from exc
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> SessionStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            self._is_closed = True
            self._db.close()

    # ---- a turn

    def begin(
        self, owner: str, session: str, messages: Sequence[tuple[str, str]], request_id: str, *, replaces: bool = False
    ) -> Turn:
        """Commit what somebody says, and a place for the answer. The session is made if there is none.

        Args:
            owner: whose session.
            session: its id.
            messages: role and content of each.
            request_id: of the answer that is to come.
            replaces: whether they stand for the whole conversation so far.
        """
        with self._transaction() as db:
            now = self._now(db, owner)
            found = db.execute(
                "SELECT key, title, updated FROM sessions WHERE owner = ? AND id = ?", (owner, session)
            ).fetchone()
            title = next((content[:TITLE_CHARACTERS] for role, content in messages if role == "user"), "")
            replaced: list[StoredMessage] = []
            if found is None:
                made = db.execute(
                    "INSERT INTO sessions (id, owner, title, created, updated) VALUES (?, ?, ?, ?, ?)",
                    (session, owner, title, now, now),
                )
                key, before = int(made.lastrowid or 0), None
            else:
                key, before = int(found[0]), (found[1], found[2])
                if replaces:
                    replaced = _messages(db, key)
                    db.execute("DELETE FROM messages WHERE session = ?", (key,))
                title = title if replaces else found[1]
                db.execute("UPDATE sessions SET title = ?, updated = ? WHERE key = ?", (title, now, key))
            (newest,) = db.execute("SELECT max(number) FROM messages WHERE session = ?", (key,)).fetchone()
            first = (newest or 0) + 1
            answer = first + len(messages)
            rows = [
                (key, number, role, content, now, None, None)
                for number, (role, content) in enumerate(messages, start=first)
            ]
            db.executemany(
                f"{_INSERT} (?, ?, ?, ?, ?, ?, ?)", [*rows, (key, answer, "assistant", "", now, None, request_id)]
            )
        return Turn(key, answer, request_id, first, replaced, before)

    def undo(self, turn: Turn) -> None:
        """As if the turn had never begun."""
        with self._transaction() as db:
            if turn.before is None:
                db.execute("DELETE FROM sessions WHERE key = ?", (turn.session,))
                return
            db.execute("DELETE FROM messages WHERE session = ? AND number >= ?", (turn.session, turn.first))
            rows = [
                (turn.session, old.number, old.role, old.content, old.created, old.finish_reason, old.request_id)
                for old in turn.replaced
            ]
            db.executemany(f"{_INSERT} (?, ?, ?, ?, ?, ?, ?)", rows)
            db.execute("UPDATE sessions SET title = ?, updated = ? WHERE key = ?", (*turn.before, turn.session))

    def save(self, turn: Turn, text: str) -> None:
        """Commit what there is of an answer; one that has ended stays as it is."""
        with self._transaction() as db:
            db.execute(
                "UPDATE messages SET content = ? "
                "WHERE session = ? AND number = ? AND request_id = ? AND finish_reason IS NULL",
                (text, turn.session, turn.answer, turn.request_id),
            )

    def end(self, turn: Turn, text: str, finish_reason: str) -> None:
        """Commit a whole answer, or what there will ever be of it."""
        # Also where it says "interrupted" by now: that was another server, which could not know that this one lives.
        with self._transaction() as db:
            done = db.execute(
                "UPDATE messages SET content = ?, finish_reason = ? "
                "WHERE session = ? AND number = ? AND request_id = ?",
                (text, finish_reason, turn.session, turn.answer, turn.request_id),
            )
            if done.rowcount:
                (owner,) = db.execute("SELECT owner FROM sessions WHERE key = ?", (turn.session,)).fetchone()
                db.execute("UPDATE sessions SET updated = ? WHERE key = ?", (self._now(db, owner), turn.session))

    # ---- reading, deleting

    def messages(self, owner: str, session: str) -> list[StoredMessage] | None:
        """A conversation, oldest first; None: this owner has no such session."""
        with self._transaction() as db:
            key = _key(db, owner, session)
            return None if key is None else _messages(db, key)

    def sessions(self, owner: str, limit: int, before: float | None = None) -> list[Summary]:
        """An owner's conversations, newest first; `before`: only those whose `updated` is less."""
        with self._transaction() as db:
            found = db.execute(
                "SELECT id, title, updated, (SELECT count(*) FROM messages WHERE session = key) "
                "FROM sessions WHERE owner = ? AND updated < ? ORDER BY updated DESC LIMIT ?",
                (owner, float("inf") if before is None else before, limit),
            )
            return [Summary(*row) for row in found]

    def delete(self, owner: str, session: str) -> bool:
        """Forget a conversation; False: this owner has no such session."""
        with self._transaction() as db:
            done = db.execute("DELETE FROM sessions WHERE owner = ? AND id = ?", (owner, session))
            return done.rowcount > 0

    def _prepare(self) -> None:
        """Look whose file it is before anything is written to it."""
        db = self._db
        (application,), (version,), (tables,) = (
            db.execute(query).fetchone()
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        is_new = (application, version, tables) == (0, 0, 0)
        if not is_new and application != _APPLICATION:
            raise _refusal(self._name, "is another program's database")
        if version > VERSION:
            raise _refusal(self._name, f"is of version {version}, and this smolcluster knows {VERSION} at most")
        # Where the file system has no shared memory (NFS) this leaves the other journal, which is as safe.
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = WAL")
        # What is committed is the system's then, and survives the process. A power cut may take the newest of it.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN IMMEDIATE")
        if is_new and not db.execute("PRAGMA user_version").fetchone()[0]:  # else another server was faster
            for statement in _SCHEMA:
                db.execute(statement)
        db.execute(
            "UPDATE messages SET finish_reason = ? WHERE finish_reason IS NULL AND request_id IS NOT NULL",
            (INTERRUPTED,),
        )
        db.execute("COMMIT")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._is_closed:
                raise StoreFailed(f"{self._name} is closed: the server is shutting down")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as exc:
                raise StoreFailed(
                    f"{self._name} cannot be read or written ({exc}). Look whether its disk is full"
                ) from exc
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _now(self, db: sqlite3.Connection, owner: str) -> float:
        """Later than all that this owner's sessions know, whatever the clock does."""
        (newest,) = db.execute("SELECT max(updated) FROM sessions WHERE owner = ?", (owner,)).fetchone()
        return max(round(time.time(), 6), (newest or 0.0) + _TICK)


def _make_file(file: Path) -> None:
    """An empty file that nobody else may read. SQLite gives the files beside it the same rights."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as exc:
        raise _refusal(str(file), f"cannot be written ({exc.strerror or exc})") from exc


def _refusal(name: str, what: str) -> ConfigError:
    return ConfigError(f"serving.sessions_file: {name} {what}. Name another file, or move that one away")


def _key(db: sqlite3.Connection, owner: str, session: str) -> int | None:
    found = db.execute("SELECT key FROM sessions WHERE owner = ? AND id = ?", (owner, session)).fetchone()
    return None if found is None else int(found[0])


def _messages(db: sqlite3.Connection, key: int) -> list[StoredMessage]:
    found = db.execute(f"SELECT {_COLUMNS} FROM messages WHERE session = ? ORDER BY number", (key,))
    return [StoredMessage(*row) for row in found]
