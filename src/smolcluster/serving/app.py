"""The HTTP interface: OpenAI's paths, `/chat`, `/ws`, and what operators look at. See docs/inference.md.

Everything here runs in one asyncio loop and waits for the engine, which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, TypeVar

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from smolcluster.errors import ServingError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.serving.guard import Guard
from smolcluster.serving.metrics import CONTENT_TYPE, ServingMetrics
from smolcluster.serving.openai import (
    AnswerBody,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    chat_logprobs,
    completion_logprobs,
    error_body,
    told_wrong,
    usage,
)
from smolcluster.serving.openapi import describe
from smolcluster.serving.requests import ContextOverflow, QueueFull, Unavailable
from smolcluster.serving.requests import Request as EngineRequest
from smolcluster.serving.sampling import Sampled
from smolcluster.serving.service import Answer, Service

logger = logging.getLogger(__name__)

RETRY_AFTER = 1  # seconds
_Given = TypeVar("_Given")
_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class PromptRequest(AnswerBody):
    """Body of `POST /chat`, and of a request over `/ws`."""

    text: str | None = None
    """What the user says."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """Or a whole conversation, oldest message first."""

    @model_validator(mode="after")
    def _one_prompt(self) -> PromptRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, one of them")
        return self


def make_app(service: Service, guard: Guard, metrics: ServingMetrics) -> FastAPI:
    """The application.

    Args:
        service: answers.
        guard: who may ask.
        metrics: what `GET /metrics` tells.
    """
    app = FastAPI(title="smolcluster", docs_url=None, redoc_url=None)
    app.add_middleware(guard.middleware)
    _add_errors(app)
    api = _Api(service, metrics)
    app.post("/v1/chat/completions", response_model=None)(api.chat_completions)
    app.post("/v1/completions", response_model=None)(api.completions)
    app.get("/v1/models", response_model=None)(api.models)
    app.get("/v1/models/{model:path}", response_model=None)(api.model)
    app.post("/chat", response_model=None)(api.chat)
    app.get("/config", response_model=None)(api.config)
    app.get("/health", response_model=None)(api.health)
    app.get("/metrics", response_model=None)(api.metrics)
    app.post("/reconnect", response_model=None)(api.reconnect)
    app.websocket("/ws")(api.websocket)
    describe(app, (ChatRequest, CompletionRequest, PromptRequest))
    return app


class _Api:
    def __init__(self, service: Service, metrics: ServingMetrics) -> None:
        self._service = service
        self._metrics = metrics

    # ---- OpenAI's paths

    async def chat_completions(self, body: ChatRequest, http: Request) -> Response:
        """The next message of a conversation, as OpenAI's chat completions."""
        service = self._service
        self._check_model(body.model)
        prompt = await _apart(service.encode_chat, [message.plain() for message in body.messages])
        request = service.request(prompt, body.wishes())
        answer, head = service.ask(request), _head("chatcmpl", "chat.completion", service.model)
        if body.stream:
            return _stream(self._chat_chunks(answer, head, request, body.wants_usage), answer)
        told = await _whole(answer, http)
        choice: JsonObject = {
            "index": 0,
            "message": {"role": "assistant", "content": told.text, "refusal": None},
            "logprobs": self._chat_logprobs(told.tokens) if request.sampling.logprobs is not None else None,
            "finish_reason": told.reason,
        }
        return JSONResponse({**head, "choices": [choice], "usage": usage(len(prompt), len(told.tokens))})

    async def _chat_chunks(
        self, answer: Answer, head: JsonObject, request: EngineRequest, has_usage: bool
    ) -> AsyncIterator[str]:
        head = {**head, "object": "chat.completion.chunk"}
        more: JsonObject = {"usage": None} if has_usage else {}

        def chunk(delta: JsonObject, logprobs: JsonObject | None = None, reason: str | None = None) -> str:
            choice: JsonObject = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _event({**head, "choices": [choice], **more})

        yield chunk({"role": "assistant", "content": ""})
        count = 0
        async for event in answer:
            if event.finish_reason == "error":
                yield _event(error_body(event.error or "", "server_error"))
                return
            count += event.token is not None
            logprobs = None
            if event.token is not None and request.sampling.logprobs is not None:
                logprobs = self._chat_logprobs([event.token])
            if event.text or logprobs:
                yield chunk({"content": event.text}, logprobs)
            if event.finish_reason is not None:
                yield chunk({}, reason=event.finish_reason)
        if has_usage:
            yield _event({**head, "choices": [], "usage": usage(len(request.prompt), count)})
        yield "data: [DONE]\n\n"

    async def completions(self, body: CompletionRequest, http: Request) -> Response:
        """How a text goes on, as OpenAI's completions."""
        service = self._service
        self._check_model(body.model)
        given = body.text_or_ids()
        prompt = await _apart(service.encode, given) if isinstance(given, str) else given
        request = service.request(prompt, body.wishes())
        answer, head = service.ask(request), _head("cmpl", "text_completion", service.model)
        if body.stream:
            return _stream(self._text_chunks(answer, head, request, body.wants_usage), answer)
        told = await _whole(answer, http)
        logprobs = self._text_logprobs(told.tokens, 0)[0] if request.sampling.logprobs is not None else None
        choice: JsonObject = {"index": 0, "text": told.text, "logprobs": logprobs, "finish_reason": told.reason}
        return JSONResponse({**head, "choices": [choice], "usage": usage(len(prompt), len(told.tokens))})

    async def _text_chunks(
        self, answer: Answer, head: JsonObject, request: EngineRequest, has_usage: bool
    ) -> AsyncIterator[str]:
        more: JsonObject = {"usage": None} if has_usage else {}
        count = offset = 0
        async for event in answer:
            if event.finish_reason == "error":
                yield _event(error_body(event.error or "", "server_error"))
                return
            logprobs = None
            if event.token is not None:
                count += 1
                if request.sampling.logprobs is not None:
                    logprobs, offset = self._text_logprobs([event.token], offset)
            if event.text or logprobs or event.finish_reason is not None:
                choice: JsonObject = {
                    "index": 0,
                    "text": event.text,
                    "logprobs": logprobs,
                    "finish_reason": event.finish_reason,
                }
                yield _event({**head, "choices": [choice], **more})
        if has_usage:
            yield _event({**head, "choices": [], "usage": usage(len(request.prompt), count)})
        yield "data: [DONE]\n\n"

    async def models(self) -> JsonObject:
        """The one model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> JsonObject:
        """The served model, by its id."""
        self._check_model(model)
        return self._model()

    def _model(self) -> JsonObject:
        service = self._service
        return {"id": service.model, "object": "model", "created": service.started, "owned_by": "smolcluster"}

    def _check_model(self, model: str) -> None:
        if model != self._service.model:
            raise _Refusal(
                404,
                f"there is no model {model!r} here. This server has {self._service.model!r}",
                param="model",
                code="model_not_found",
            )

    def _chat_logprobs(self, tokens: list[Sampled]) -> JsonObject:
        return chat_logprobs(tokens, self._service.token_text)

    def _text_logprobs(self, tokens: list[Sampled], offset: int) -> tuple[JsonObject, int]:
        return completion_logprobs(tokens, self._service.token_text, offset)

    # ---- our own

    async def chat(self, body: PromptRequest) -> Response:
        """An answer to a text or a conversation, as server-sent events."""
        began = time.perf_counter()
        answer = await self._ask(body)
        events = (_event(event) async for event in _told(answer, began))
        return _stream(events, answer)

    async def websocket(self, socket: WebSocket) -> None:
        """The same events over a WebSocket, several requests at once."""
        await socket.accept()
        under_way: dict[str, tuple[Answer, asyncio.Task[None]]] = {}
        try:
            while True:
                await self._take(socket, under_way)
        except WebSocketDisconnect:
            pass
        finally:
            for answer, task in under_way.values():
                answer.cancel()
                task.cancel()

    async def _take(self, socket: WebSocket, under_way: dict[str, tuple[Answer, asyncio.Task[None]]]) -> None:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        began, request_id = time.perf_counter(), None
        try:
            content = json.loads(message.get("text") or message.get("bytes") or "")
            if not isinstance(content, dict):
                raise ValueError("a request is a JSON object")
            if "cancel" in content:
                if (found := under_way.get(str(content["cancel"]))) is not None:
                    found[0].cancel()
                return
            request_id = str(content.pop("id", secrets.token_hex(8)))
            request_id.encode()  # half a surrogate pair could not be sent back
            if request_id in under_way:
                raise ValueError(f"request {request_id} is under way already")
            answer = await self._ask(PromptRequest.model_validate(content))
        except (ValueError, RecursionError, SmolError) as error:  # pydantic's and json's are ValueErrors
            request_id = None if isinstance(error, UnicodeEncodeError) else request_id
            await socket.send_json({"id": request_id, "error": _reason(error), "done": True})
            return
        task = asyncio.create_task(_pass_on(socket, request_id, answer, began))
        under_way[request_id] = answer, task
        task.add_done_callback(lambda _: under_way.pop(request_id, None))

    async def _ask(self, body: PromptRequest) -> Answer:
        service = self._service
        messages = body.messages or [ChatMessage(role="user", content=body.text)]
        prompt = await _apart(service.encode_chat, [message.plain() for message in messages])
        return service.ask(service.request(prompt, body.wishes()))

    async def config(self) -> JsonObject:
        """What is served, and how."""
        settings = self._service.settings
        return {
            "model": self._service.model,
            "ctx_length": self._service.engine.length,
            "max_new_tokens": settings.max_new_tokens,
            "max_queue": settings.max_queue,
            "active_decoding_strategy": settings.active_decoding_strategy,
            "decoding_strategies": settings.decoding_strategies.model_dump(mode="json"),
            **self._service.describe(),
        }

    async def metrics(self) -> Response:
        """What the engine does, for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def reconnect(self) -> JsonObject:
        """Put the stages together anew, with all nodes that are there now. Answers under way go on."""
        self._service.engine.reconnect()
        return {"status": "reconnecting"}

    async def health(self) -> Response:
        """Whether it answers: 200, or 503 while nobody computes."""
        engine = self._service.engine
        if engine.failure is not None:
            return JSONResponse({"status": "unavailable", "reason": engine.failure}, status_code=503)
        return JSONResponse({"status": "ok", "running": engine.running, "waiting": engine.waiting})


# ---- answers


class _Told:
    """A whole answer."""

    def __init__(self) -> None:
        self.text, self.tokens, self.reason = "", list[Sampled](), ""


async def _whole(answer: Answer, http: Request) -> _Told:
    """Wait for all of it; the answer is cancelled when the client goes."""
    gone = asyncio.create_task(_disconnected(http))
    told = asyncio.create_task(_gathered(answer))
    try:
        await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            raise _Refusal(499, "the client has closed the connection")
        return told.result()
    finally:
        gone.cancel()
        told.cancel()
        answer.cancel()


async def _gathered(answer: Answer) -> _Told:
    told = _Told()
    async for event in answer:
        if event.finish_reason == "error":
            raise _Refusal(503, event.error or "", kind="server_error")
        told.text += event.text
        told.tokens += [] if event.token is None else [event.token]
        told.reason = event.finish_reason or ""
    return told


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _told(answer: Answer, began: float) -> AsyncIterator[JsonObject]:
    """The events of `/chat` and `/ws`."""
    text, count = "", 0
    async for event in answer:
        if event.finish_reason == "error":
            yield {"error": event.error, "done": True}
            return
        if event.token is not None:
            count += 1
        text += event.text
        if event.text:
            yield {"token": event.text, "done": False}
    now = time.perf_counter()
    writing = answer.newest_at - answer.first_at
    yield {
        "done": True,
        "full_text": text,
        "num_tokens": count,
        "time_to_first_token_ms": round(1000 * ((answer.first_at or now) - began), 3),
        "tokens_per_second": round((count - 1) / writing, 3) if count > 1 and writing > 0 else 0.0,
        "total_time_ms": round(1000 * (now - began), 3),
        "finish_reason": event.finish_reason,
    }


async def _pass_on(socket: WebSocket, request_id: str, answer: Answer, began: float) -> None:
    try:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client has gone
            async for event in _told(answer, began):
                await socket.send_json({"id": request_id, **event})
    finally:
        answer.cancel()


async def _apart(encode: Callable[[_Given], list[int]], given: _Given) -> list[int]:
    """Tokens of a prompt; a long one in a thread, so that nobody else waits for it."""
    return await asyncio.to_thread(encode, given)


def _stream(events: AsyncIterator[str], answer: Answer) -> StreamingResponse:
    async def guarded() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        finally:
            answer.cancel()

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=_SSE)


def _event(content: JsonObject) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _head(prefix: str, kind: str, model: str) -> JsonObject:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


# ---- errors


class _Refusal(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param=param, code=code)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return told_wrong(error.errors())[0]
    return str(error)


def _add_errors(app: FastAPI) -> None:
    """OpenAI's error object, whatever is wrong."""

    @app.exception_handler(_Refusal)
    async def _(_: Request, error: _Refusal) -> Response:
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        message, param = told_wrong(error.errors())
        return JSONResponse(error_body(message, "invalid_request_error", param=param), status_code=400)

    @app.exception_handler(ContextOverflow)
    async def _(_: Request, error: ContextOverflow) -> Response:
        body = error_body(str(error), "invalid_request_error", param="messages", code="context_length_exceeded")
        return JSONResponse(body, status_code=400)

    @app.exception_handler(QueueFull)
    async def _(_: Request, error: QueueFull) -> Response:
        body = error_body(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(body, status_code=429, headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(Unavailable)
    async def _(_: Request, error: Unavailable) -> Response:
        body = error_body(str(error), "server_error", code="unavailable")
        return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(ServingError)
    async def _(_: Request, error: ServingError) -> Response:
        return JSONResponse(error_body(str(error), "invalid_request_error"), status_code=400)

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        return JSONResponse(
            error_body(str(error.detail), "invalid_request_error"), status_code=error.status_code, headers=error.headers
        )

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> Response:
        logger.error("a request has failed", exc_info=error)
        return JSONResponse(error_body("the server has failed; see its log", "server_error"), status_code=500)
