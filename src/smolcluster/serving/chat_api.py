"""Our own paths: `/chat`, `/ws`, and the sessions that answers may belong to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from smolcluster.errors import SmolError
from smolcluster.kinds import JsonObject
from smolcluster.serving.answer_events import EventStream, answer_events, sse
from smolcluster.serving.chat_template import Message
from smolcluster.serving.conversations import Conversations, LiveAnswer, Unknown
from smolcluster.serving.openai import AnswerBody, ChatMessage
from smolcluster.serving.refusals import Refusal, reason
from smolcluster.serving.service import Answer, Service

# Ids stand in paths and headers: nothing there that would have to be quoted.
_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# A stream of so many events has never been.
_EVENT_DIGITS = 12


class PromptRequest(AnswerBody):
    """Body of `POST /chat`, and of a request over `/ws`."""

    text: str | None = None
    """What the user says."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """Or a whole conversation, oldest message first."""
    session_id: _Id | None = None
    """Of a conversation that the server keeps: `text` follows it, `messages` replace it."""
    request_id: _Id | None = None
    """By which the answer can be listened to again; with a session_id only. null: any."""

    @model_validator(mode="after")
    def _one_prompt(self) -> PromptRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, one of them")
        if self.request_id is not None and self.session_id is None:
            raise ValueError("a request_id needs a session_id: only the answers of sessions can be resumed")
        return self

    def said(self) -> list[Message]:
        """The messages."""
        messages = self.messages or [ChatMessage(role="user", content=self.text)]
        return [message.plain() for message in messages]


class _ResumeRequest(BaseModel):
    """Over `/ws`: go on with an answer."""

    resume: _Id
    after: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """What one client hears over a WebSocket; `is_kept`: the answer does not end with the connection."""

    cancel: Callable[[], None]
    is_kept: bool
    task: asyncio.Task[None]


class ChatApi:
    """Answers to a text or a conversation."""

    def __init__(self, service: Service, conversations: Conversations) -> None:
        """Args:
        service: answers.
        conversations: answers those that name a session.
        """
        self._service = service
        self._conversations = conversations

    def add_to(self, app: FastAPI) -> None:
        """Serve the paths."""
        app.post("/chat", response_model=None)(self.chat)
        app.get("/chat/{request_id}/events", response_model=None)(self.events)
        app.delete("/chat/{request_id}", response_model=None)(self.cancel)
        app.websocket("/ws")(self.websocket)
        app.get("/sessions", response_model=None)(self.sessions)
        app.get("/sessions/{session_id}", response_model=None)(self.session)
        app.delete("/sessions/{session_id}", response_model=None)(self.delete_session)

    # ---- server-sent events

    async def chat(self, body: PromptRequest, http: Request) -> Response:
        """An answer to a text or a conversation. With a session_id it goes on when the client goes."""
        began = time.perf_counter()
        if body.session_id is not None:
            return _resumable(await self._ask_in_session(body, http.state.owner, began), 0)
        answer = await self._ask(body)
        return EventStream((sse(event) async for event in answer_events(answer, began)), at_end=answer.cancel)

    async def events(self, request_id: str, http: Request, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The rest of an answer, after the event that the header Last-Event-ID names, or `after`.

        204: there is none, and will be none; it tells a browser not to ask again.
        """
        live = self._conversations.answer(http.state.owner, request_id)
        given = http.headers.get("last-event-id")
        if given:  # a browser that connects again sends it, and the same `after` as the first time
            if not (given.isascii() and given.isdecimal() and len(given) <= _EVENT_DIGITS):
                raise Refusal(400, f"Last-Event-ID is {given[:40]!r}. Give an event's number", param="Last-Event-ID")
            after = int(given)
        if not live.has_after(after):
            return Response(status_code=204, headers={"X-Request-Id": request_id})
        return _resumable(live, after)

    async def cancel(self, request_id: str, http: Request) -> JsonObject:
        """End an answer on every stage; its last event."""
        live = self._conversations.answer(http.state.owner, request_id)
        live.cancel()
        return {"session_id": live.session, **await live.ended()}

    # ---- sessions

    async def sessions(
        self, http: Request, limit: Annotated[int, Query(ge=1, le=200)] = 50, before: float | None = None
    ) -> JsonObject:
        """The newest conversations; `before`: the `updated` of the last one that is known."""
        found = await self._conversations.sessions(http.state.owner, limit, before)
        return {"sessions": [asdict(summary) for summary in found]}

    async def session(self, session_id: str, http: Request) -> JsonObject:
        """A conversation, and the answer that is under way in it."""
        messages, running = await self._conversations.session(http.state.owner, session_id)
        return {"id": session_id, "messages": [asdict(message) for message in messages], "running": running}

    async def delete_session(self, session_id: str, http: Request) -> JsonObject:
        """Forget a conversation."""
        await self._conversations.delete(http.state.owner, session_id)
        return {"id": session_id, "deleted": True}

    # ---- WebSocket

    async def websocket(self, socket: WebSocket) -> None:
        """The same events over a WebSocket, several requests at once."""
        await socket.accept()
        under_way: dict[str, _UnderWay] = {}
        try:
            while True:
                await self._take(socket, under_way)
        except WebSocketDisconnect:
            pass
        finally:
            for one in under_way.values():
                if not one.is_kept:
                    one.cancel()
                one.task.cancel()

    async def _take(self, socket: WebSocket, under_way: dict[str, _UnderWay]) -> None:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        began, name = time.perf_counter(), None
        try:
            content = json.loads(message.get("text") or message.get("bytes") or "")
            if not isinstance(content, dict):
                raise ValueError("a request is a JSON object")
            if "cancel" in content:
                self._cancel(str(content["cancel"]), socket.state.owner, under_way)
                return
            name = str(content.pop("id", content.get("resume") or secrets.token_hex(8)))
            name.encode()  # half a surrogate pair could not be sent back
            if name in under_way:
                raise ValueError(f"request {name} is under way already")
            found, events = await self._begin(content, socket.state.owner, began)
        except (ValueError, RecursionError, SmolError) as error:  # pydantic's and json's are ValueErrors
            name = None if isinstance(error, UnicodeEncodeError) else name
            await socket.send_json({"id": name, "error": reason(error), "done": True})
            return
        is_kept = isinstance(found, LiveAnswer)
        task = asyncio.create_task(_pass_on(socket, name, events, (lambda: None) if is_kept else found.cancel))
        under_way[name] = _UnderWay(found.cancel, is_kept, task)
        task.add_done_callback(lambda _: under_way.pop(name, None))

    def _cancel(self, name: str, owner: str, under_way: dict[str, _UnderWay]) -> None:
        """By the id of a request of this connection, or by a request_id."""
        if (one := under_way.get(name)) is not None:
            one.cancel()
            return
        with contextlib.suppress(Unknown):
            self._conversations.answer(owner, name).cancel()

    async def _begin(
        self, content: dict[str, Any], owner: str, began: float
    ) -> tuple[Answer | LiveAnswer, AsyncGenerator[JsonObject, None]]:
        """What a message asks for: an answer, and its events."""
        if "resume" in content:
            wanted = _ResumeRequest.model_validate(content)
            live = self._conversations.answer(owner, wanted.resume)
            live.has_after(wanted.after)
            return live, _numbered(live, wanted.after)
        body = PromptRequest.model_validate(content)
        if body.session_id is not None:
            live = await self._ask_in_session(body, owner, began)
            return live, _numbered(live, 0)
        answer = await self._ask(body)
        return answer, answer_events(answer, began)

    # ---- asking

    async def _ask(self, body: PromptRequest) -> Answer:
        service = self._service
        # A long prompt takes its time: in a thread, so that nobody else waits for it.
        prompt = await asyncio.to_thread(service.encode_chat, body.said())
        return service.ask(service.request(prompt, body.wishes()))

    async def _ask_in_session(self, body: PromptRequest, owner: str, began: float) -> LiveAnswer:
        assert body.session_id is not None
        return await self._conversations.ask(
            owner,
            body.session_id,
            body.said(),
            body.wishes(),
            replaces=body.messages is not None,
            began=began,
            request_id=body.request_id,
        )


def _resumable(live: LiveAnswer, after: int) -> Response:
    async def told() -> AsyncGenerator[str, None]:
        async with aclosing(live.listen(after)) as events:
            async for number, event in events:
                yield sse(event, number)

    return EventStream(told(), headers={"X-Request-Id": live.request_id})


async def _numbered(live: LiveAnswer, after: int) -> AsyncGenerator[JsonObject, None]:
    async with aclosing(live.listen(after)) as events:
        async for number, event in events:
            yield {**event, "event_id": number}


async def _pass_on(
    socket: WebSocket, name: str, events: AsyncGenerator[JsonObject, None], at_end: Callable[[], None]
) -> None:
    try:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client has gone
            async with aclosing(events):
                async for event in events:
                    await socket.send_json({"id": name, **event})
    finally:
        at_end()
