"""Answers of sessions: they are stored, live on when their connection closes, and can be listened to again.

Everything here belongs to one event loop's thread; what touches the disk goes to another one meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

from smolcluster.errors import ServingError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.serving.answer_events import answer_events
from smolcluster.serving.chat_template import Message
from smolcluster.serving.service import Answer, Service, Wishes
from smolcluster.serving.sessions import INTERRUPTED, SessionStore, StoredMessage, StoreFailed, Summary, Turn

logger = logging.getLogger(__name__)

# How often what there is of an answer is committed.
SAVE_SECONDS = 1.0
# For answers to end when the server does.
CLOSE_SECONDS = 2.0
# Whoever asked has at least so long until it listens, also where resume_s is 0.
_FIRST_SECONDS = 5.0

_Place = tuple[str, str]


class Unknown(ServingError):
    """There is no such session or answer, or it is somebody else's."""


class Conflict(ServingError):
    """Something is in use.

    Attributes:
        code: `answer_under_way` or `request_id_in_use`.
    """

    def __init__(self, message: str, code: Literal["answer_under_way", "request_id_in_use"]) -> None:
        super().__init__(message)
        self.code = code


class LiveAnswer:
    """An answer that does not need its connection. It keeps its events, which its max_tokens bounds.

    Attributes:
        request_id: its name.
        session: the id of its session.
    """

    def __init__(
        self, answer: Answer, turn: Turn, store: SessionStore, *, session: str, began: float, resume_s: float
    ) -> None:
        """Args:
        answer: under way.
        turn: where it is stored.
        store: in what.
        session: its session.
        began: `time.perf_counter()` when the request came.
        resume_s: seconds that it goes on while nobody listens.
        """
        self.request_id = turn.request_id
        self.session = session
        self._answer = answer
        self._turn = turn
        self._store = store
        self._began = began
        self._resume_s = resume_s
        self._events: list[JsonObject] = []
        self._news = asyncio.Event()
        self._text = ""
        self._has_ended = asyncio.Event()
        self._is_interrupted = False
        self._listeners = 0
        loop = asyncio.get_running_loop()
        self._lonely: asyncio.TimerHandle | None = loop.call_later(max(resume_s, _FIRST_SECONDS), self.cancel)

    async def listen(self, after: int) -> AsyncGenerator[tuple[int, JsonObject], None]:
        """Every event after one, with its number, to the last one. Any number of listeners, each at its own pace."""
        self._listeners += 1
        self._stop_timer()
        try:
            while True:
                while after < len(self._events):
                    after += 1
                    yield after, self._events[after - 1]
                if self._has_ended.is_set():
                    return
                await self._news.wait()
        finally:
            self._listeners -= 1
            if not self._listeners and not self._has_ended.is_set():
                self._lonely = asyncio.get_running_loop().call_later(self._resume_s, self.cancel)

    def has_after(self, number: int) -> bool:
        """Whether events come after this one.

        Raises:
            ServingError: there is no such event yet.
        """
        count = len(self._events)
        if number > count:
            raise ServingError(f"there is no event {number} yet: {self.request_id} has had {count}")
        return number < count or not self._has_ended.is_set()

    def cancel(self) -> None:
        """Let the stages stop; what there is of it is stored. One that has ended stays as it is."""
        self._answer.cancel()

    def interrupt(self) -> None:
        """Cancel it, not because anybody wanted it."""
        self._is_interrupted = True
        self.cancel()

    async def ended(self) -> JsonObject:
        """Its last event, when that is there."""
        await self._has_ended.wait()
        return self._events[-1]

    async def run(self, release: Callable[[], None]) -> None:
        """Keep its events, to the last one, and store it. `release` is called before anybody hears of its end."""
        saving = asyncio.create_task(self._save_often())
        last: JsonObject = {"error": "the server has failed; see its log", "done": True}
        try:
            async for event in answer_events(self._answer, self._began):
                if event["done"]:
                    last = event
                else:
                    self._text += str(event["token"])
                    self._publish(event)
        except Exception:  # a defect: whoever listens must hear of the end
            logger.exception("an answer has failed request_id=%s", self.request_id)
            self.cancel()
        finally:
            saving.cancel()  # a write that is under way changes nothing once the end is stored
        finish_reason = str(last.get("finish_reason") or "error")
        await self.store_end(INTERRUPTED if self._is_interrupted and finish_reason == "cancelled" else finish_reason)
        self._stop_timer()
        release()
        self._has_ended.set()
        self._publish(last)

    async def store_end(self, finish_reason: str) -> None:
        """Commit what there is of it, for ever."""
        try:
            await asyncio.to_thread(self._store.end, self._turn, self._text, finish_reason)
        except StoreFailed as error:  # whoever listens has it all the same
            logger.error("an answer is not stored request_id=%s reason=%s", self.request_id, error)

    async def _save_often(self) -> None:
        saved = ""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            if (text := self._text) != saved:
                try:
                    await asyncio.to_thread(self._store.save, self._turn, text)
                    saved = text
                except StoreFailed as error:
                    logger.warning("an answer is not stored yet request_id=%s reason=%s", self.request_id, error)

    def _publish(self, event: JsonObject) -> None:
        self._events.append({**event, "request_id": self.request_id})
        self._news.set()
        self._news = asyncio.Event()

    def _stop_timer(self) -> None:
        if self._lonely is not None:
            self._lonely.cancel()
            self._lonely = None


class Conversations:
    """All sessions, and the answers under way in them. An owner sees its own only."""

    def __init__(self, service: Service, store: SessionStore) -> None:
        """Args:
        service: answers.
        store: keeps the conversations.
        """
        self._service = service
        self._store = store
        # None: about to begin or, a session, about to be deleted.
        self._running: dict[_Place, LiveAnswer | None] = {}
        self._answers: dict[_Place, LiveAnswer | None] = {}
        self._tasks: dict[LiveAnswer, asyncio.Task[None]] = {}

    async def ask(
        self,
        owner: str,
        session: str,
        messages: Sequence[Message],
        wishes: Wishes,
        *,
        replaces: bool,
        began: float,
        request_id: str | None = None,
    ) -> LiveAnswer:
        """Store what somebody says, and begin the answer.

        Args:
            owner: who.
            session: where; it is made if there is none.
            messages: what.
            wishes: about the answer.
            replaces: whether the messages are the whole conversation, and not what follows it.
            began: `time.perf_counter()` when the request came.
            request_id: the answer's name; None: any.

        Raises:
            Conflict: the session has an answer under way, or the request_id is in use.
            ContextOverflow, QueueFull, Unavailable: see Engine.submit; nothing is stored then.
        """
        place, name = (owner, session), (owner, request_id or secrets.token_hex(12))
        if place in self._running:
            raise Conflict(
                f"session {session} has an answer under way. Wait for its end, or cancel it", "answer_under_way"
            )
        if name in self._answers:
            raise Conflict(f"request_id {name[1]} is in use. Listen to it, or choose another", "request_id_in_use")
        self._running[place] = self._answers[name] = None
        try:
            live = await self._begin(place, name[1], messages, wishes, replaces=replaces, began=began)
        except BaseException:
            del self._running[place], self._answers[name]
            raise
        self._running[place] = self._answers[name] = live
        self._tasks[live] = asyncio.create_task(live.run(lambda: self._release(place, name)))
        return live

    def answer(self, owner: str, request_id: str) -> LiveAnswer:
        """One that is under way, or has ended not long ago.

        Raises:
            Unknown: there is none.
        """
        live = self._answers.get((owner, request_id))
        if live is None:
            raise Unknown(f"there is no answer {request_id}: it was never asked for, or ended too long ago")
        return live

    async def sessions(self, owner: str, limit: int, before: float | None) -> list[Summary]:
        """See SessionStore."""
        return await asyncio.to_thread(self._store.sessions, owner, limit, before)

    async def session(self, owner: str, session: str) -> tuple[list[StoredMessage], str | None]:
        """A conversation, and the request_id of the answer that is under way in it.

        Raises:
            Unknown: there is none.
        """
        running = self._running.get((owner, session))  # before: an answer that ends meanwhile can still be listened to
        messages = await asyncio.to_thread(self._store.messages, owner, session)
        if messages is None:
            raise _unknown(session)
        return messages, None if running is None else running.request_id

    async def delete(self, owner: str, session: str) -> None:
        """Forget a conversation; an answer that is under way in it is cancelled.

        Raises:
            Unknown: there is none.
            Conflict: somebody asks in it at this very moment.
        """
        place = owner, session
        while (live := self._running.get(place)) is not None:
            live.cancel()
            await live.ended()
        if place in self._running:
            raise Conflict(f"session {session} is about to be answered. Try again", "answer_under_way")
        self._running[place] = None
        try:
            is_deleted = await asyncio.to_thread(self._store.delete, owner, session)
        finally:
            del self._running[place]
        for name, kept in list(self._answers.items()):
            if kept is not None and (name[0], kept.session) == place:
                del self._answers[name]
        if not is_deleted:
            raise _unknown(session)

    async def close(self) -> None:
        """Cancel and store what is under way, and close the store; takes CLOSE_SECONDS at most, and the disk's time."""
        tasks = dict(self._tasks)
        for live in tasks:
            live.interrupt()
        if tasks:
            await asyncio.wait(tasks.values(), timeout=CLOSE_SECONDS)
        for live, task in tasks.items():
            if not task.done():  # its stages do not answer
                task.cancel()
                await live.store_end(INTERRUPTED)
        await asyncio.to_thread(self._store.close)

    async def _begin(
        self,
        place: _Place,
        request_id: str,
        messages: Sequence[Message],
        wishes: Wishes,
        *,
        replaces: bool,
        began: float,
    ) -> LiveAnswer:
        service, store = self._service, self._store
        before = None if replaces else await asyncio.to_thread(store.messages, *place)
        history: list[Message] = [{"role": old.role, "content": old.content} for old in before or ()]
        prompt = await asyncio.to_thread(service.encode_chat, [*history, *messages])
        request = service.request(prompt, wishes)
        said = [(str(message["role"]), str(message["content"])) for message in messages]
        turn = await asyncio.to_thread(store.begin, *place, said, request_id, replaces=replaces)
        try:
            answer = service.ask(request)
        except SmolError:
            with contextlib.suppress(StoreFailed):  # what was wrong first is what the client hears
                await asyncio.to_thread(store.undo, turn)
            raise
        resume_s = service.settings.resume_s
        return LiveAnswer(answer, turn, store, session=place[1], began=began, resume_s=resume_s)

    def _release(self, place: _Place, name: _Place) -> None:
        """An answer is stored: its session may go on. Its events are kept a while."""
        live = self._running.pop(place)
        assert live is not None
        del self._tasks[live]
        asyncio.get_running_loop().call_later(self._service.settings.resume_s, self._forget, name, live)

    def _forget(self, name: _Place, live: LiveAnswer) -> None:
        if self._answers.get(name) is live:
            del self._answers[name]


def _unknown(session: str) -> Unknown:
    return Unknown(f"there is no session {session}")
