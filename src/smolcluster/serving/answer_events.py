"""The events of an answer as `/chat` and `/ws` tell them, and server-sent events in general."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from smolcluster.kinds import JsonObject
from smolcluster.serving.service import Answer

_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def answer_events(answer: Answer, began: float) -> AsyncGenerator[JsonObject, None]:
    """Every piece of its text, and at last one event that is done.

    Args:
        answer: read to its end.
        began: `time.perf_counter()` when the request came; times are counted from there.
    """
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


def sse(content: JsonObject, number: int | None = None) -> str:
    """A server-sent event; `number`: its id, by which a client goes on."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        *,
        at_end: Callable[[], object] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Args:
        events: what is sent; closed at the end.
        at_end: called when all has been sent, or the client has gone.
        headers: besides the usual ones.
        """
        super().__init__(events, media_type="text/event-stream", headers={**_SSE, **(headers or {})})
        self._events = events
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()
            await self._events.aclose()
