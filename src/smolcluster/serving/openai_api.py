"""OpenAI's paths: chat completions, completions and models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from smolcluster.kinds import JsonObject
from smolcluster.serving.answer_events import EventStream, sse
from smolcluster.serving.openai import (
    ChatRequest,
    CompletionRequest,
    chat_logprobs,
    completion_logprobs,
    error_body,
    usage,
)
from smolcluster.serving.refusals import Refusal
from smolcluster.serving.requests import Request as EngineRequest
from smolcluster.serving.sampling import Sampled
from smolcluster.serving.service import Answer, Service


class OpenAIApi:
    """Answers as OpenAI's server does. A client that goes cancels its request."""

    def __init__(self, service: Service) -> None:
        """`service` answers."""
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Serve the paths."""
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.get("/v1/models", response_model=None)(self.models)
        app.get("/v1/models/{model:path}", response_model=None)(self.model)

    async def chat_completions(self, body: ChatRequest, http: Request) -> Response:
        """The next message of a conversation, as OpenAI's chat completions."""
        service = self._service
        self._check_model(body.model)
        prompt = await asyncio.to_thread(service.encode_chat, [message.plain() for message in body.messages])
        request = service.request(prompt, body.wishes())
        answer, head = service.ask(request), _head("chatcmpl", "chat.completion", service.model)
        if body.stream:
            return EventStream(self._chat_chunks(answer, head, request, body.wants_usage), at_end=answer.cancel)
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
    ) -> AsyncGenerator[str, None]:
        head = {**head, "object": "chat.completion.chunk"}
        more: JsonObject = {"usage": None} if has_usage else {}

        def chunk(delta: JsonObject, logprobs: JsonObject | None = None, reason: str | None = None) -> str:
            choice: JsonObject = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return sse({**head, "choices": [choice], **more})

        yield chunk({"role": "assistant", "content": ""})
        count = 0
        async for event in answer:
            if event.finish_reason == "error":
                yield sse(error_body(event.error or "", "server_error"))
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
            yield sse({**head, "choices": [], "usage": usage(len(request.prompt), count)})
        yield "data: [DONE]\n\n"

    async def completions(self, body: CompletionRequest, http: Request) -> Response:
        """How a text goes on, as OpenAI's completions."""
        service = self._service
        self._check_model(body.model)
        given = body.text_or_ids()
        prompt = await asyncio.to_thread(service.encode, given) if isinstance(given, str) else given
        request = service.request(prompt, body.wishes())
        answer, head = service.ask(request), _head("cmpl", "text_completion", service.model)
        if body.stream:
            return EventStream(self._text_chunks(answer, head, request, body.wants_usage), at_end=answer.cancel)
        told = await _whole(answer, http)
        logprobs = self._text_logprobs(told.tokens, 0)[0] if request.sampling.logprobs is not None else None
        choice: JsonObject = {"index": 0, "text": told.text, "logprobs": logprobs, "finish_reason": told.reason}
        return JSONResponse({**head, "choices": [choice], "usage": usage(len(prompt), len(told.tokens))})

    async def _text_chunks(
        self, answer: Answer, head: JsonObject, request: EngineRequest, has_usage: bool
    ) -> AsyncGenerator[str, None]:
        more: JsonObject = {"usage": None} if has_usage else {}
        count = offset = 0
        async for event in answer:
            if event.finish_reason == "error":
                yield sse(error_body(event.error or "", "server_error"))
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
                yield sse({**head, "choices": [choice], **more})
        if has_usage:
            yield sse({**head, "choices": [], "usage": usage(len(request.prompt), count)})
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
            raise Refusal(
                404,
                f"there is no model {model!r} here. This server has {self._service.model!r}",
                param="model",
                code="model_not_found",
            )

    def _chat_logprobs(self, tokens: list[Sampled]) -> JsonObject:
        return chat_logprobs(tokens, self._service.token_text)

    def _text_logprobs(self, tokens: list[Sampled], offset: int) -> tuple[JsonObject, int]:
        return completion_logprobs(tokens, self._service.token_text, offset)


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
            raise Refusal(499, "the client has closed the connection")
        return told.result()
    finally:
        gone.cancel()
        told.cancel()
        answer.cancel()


async def _gathered(answer: Answer) -> _Told:
    told = _Told()
    async for event in answer:
        if event.finish_reason == "error":
            raise Refusal(503, event.error or "", kind="server_error")
        told.text += event.text
        told.tokens += [] if event.token is None else [event.token]
        told.reason = event.finish_reason or ""
    return told


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _head(prefix: str, kind: str, model: str) -> JsonObject:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
