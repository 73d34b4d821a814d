"""The HTTP interface: its parts put together, and what operators look at. See docs/inference.md.

Everything here runs in one asyncio loop and waits for the engine, which has a thread of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from smolcluster.kinds import JsonObject
from smolcluster.serving.chat_api import ChatApi, PromptRequest
from smolcluster.serving.conversations import Conversations
from smolcluster.serving.guard import Guard
from smolcluster.serving.metrics import CONTENT_TYPE, ServingMetrics
from smolcluster.serving.openai import ChatRequest, CompletionRequest
from smolcluster.serving.openai_api import OpenAIApi
from smolcluster.serving.openapi import describe
from smolcluster.serving.refusals import add_errors
from smolcluster.serving.service import Service
from smolcluster.serving.sessions import SessionStore


def make_app(
    service: Service, guard: Guard, metrics: ServingMetrics, conversations: Conversations | None = None
) -> FastAPI:
    """The application.

    Args:
        service: answers.
        guard: who may ask.
        metrics: what `GET /metrics` tells.
        conversations: the sessions; closed with the application. None: they are kept in memory, as long as it lives.
    """
    kept = conversations or Conversations(service, SessionStore())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await kept.close()

    app = FastAPI(title="smolcluster", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(guard.middleware)
    add_errors(app)
    OpenAIApi(service).add_to(app)
    ChatApi(service, kept).add_to(app)
    _OperatorApi(service, metrics).add_to(app)
    describe(app, (ChatRequest, CompletionRequest, PromptRequest))
    return app


class _OperatorApi:
    def __init__(self, service: Service, metrics: ServingMetrics) -> None:
        self._service = service
        self._metrics = metrics

    def add_to(self, app: FastAPI) -> None:
        app.get("/config", response_model=None)(self.config)
        app.get("/health", response_model=None)(self.health)
        app.get("/metrics", response_model=None)(self.metrics)
        app.post("/reconnect", response_model=None)(self.reconnect)

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
