"""What clients that nobody here wrote do with a server: each function fails, or returns what it counted.

Used by test_clients.py on a server in the tests' process, and by benchmarks/serving_clients.py on real ones.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

MODEL = "stories260K-hf"
STORY = "Once upon a time"
TIMEOUT = 120.0


@dataclass(frozen=True)
class Address:
    """Where a server is, and its key."""

    port: int
    key: str | None = None
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


# ---- the openai package


def use_openai(server: Address) -> dict[str, int]:
    """Everything that the package knows to ask this server for."""
    openai = importlib.import_module("openai")
    key = server.key or "any"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "smolcluster"
        _openai_answers(client)
        _openai_logprobs(client)
        errors = _openai_errors(openai, client)
    at_once = asyncio.run(_openai_at_once(openai, server, key))
    return {"error_classes": errors, "async_at_once": at_once}


def _openai_answers(client: Any) -> None:
    messages = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": STORY}]
    for create, given, text_of in (
        (client.chat.completions.create, {"messages": messages}, lambda choice: choice.message.content),
        (client.completions.create, {"prompt": STORY}, lambda choice: choice.text),
    ):
        asked = {"model": MODEL, **given, "max_tokens": 24, "temperature": 0.9, "seed": 11}
        whole, again = create(**asked), create(**asked)
        text = text_of(whole.choices[0])
        assert text
        assert text == text_of(again.choices[0]), "the same seed, another answer"
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 24
        pieces = list(create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(_piece(piece) for piece in pieces) == text
        assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].usage == whole.usage
        assert pieces[-2].choices[0].finish_reason == "length"
        stop = text[len(text) // 2 :][:3]
        cut = create(**asked, stop=stop).choices[0]
        assert (text_of(cut), cut.finish_reason) == (text[: text.index(stop)], "stop")


def _piece(piece: Any) -> str:
    if not piece.choices:
        return ""
    choice = piece.choices[0]
    return (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""


def _openai_logprobs(client: Any) -> None:
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": STORY}]
    whole = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert "".join(token.token for token in content) == whole.choices[0].message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)
    stream = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=3, stream=True)
    told = [token for piece in stream for token in getattr(piece.choices[0].logprobs, "content", None) or []]
    assert [token.token for token in told] == [token.token for token in content]
    written = client.completions.create(**asked, prompt=STORY, logprobs=2).choices[0]
    old = written.logprobs
    assert [
        written.text[at:][: len(token)] for at, token in zip(old.text_offset, old.tokens, strict=True)
    ] == old.tokens
    assert {len(old.tokens), len(old.token_logprobs), len(old.top_logprobs), len(old.text_offset)} == {6}


def _openai_errors(openai: Any, client: Any) -> int:
    messages = [{"role": "user", "content": "Tom"}]
    wrong = client.with_options(api_key="wrong")
    expected: list[tuple[Any, str | None, Any]] = [
        (openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("gpt-4")),
        (
            openai.NotFoundError,
            "model_not_found",
            lambda: client.chat.completions.create(model="gpt-4", messages=messages),
        ),
        (
            openai.BadRequestError,
            None,
            lambda: client.chat.completions.create(model=MODEL, messages=messages, temperature=-1),
        ),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            lambda: client.chat.completions.create(model=MODEL, messages=messages, max_tokens=10_000),
        ),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            lambda: client.completions.create(model=MODEL, prompt="word " * 600),
        ),
        (openai.BadRequestError, None, lambda: client.chat.completions.create(model=MODEL, messages=[])),
    ]
    if client.api_key != "any":
        expected.append((openai.AuthenticationError, "invalid_api_key", wrong.models.list))
    for kind, code, ask in expected:
        with pytest.raises(kind) as failed:
            ask()
        assert (failed.type, failed.value.code) == (kind, code), failed.value
        assert failed.value.body["message"]
    with pytest.raises(openai.APIStatusError, match="413"):
        client.completions.create(model=MODEL, prompt="x" * (10 << 20))
    return len(expected) + 1


async def _openai_at_once(openai: Any, server: Address, key: str) -> int:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT) as client:

        async def one(number: int) -> str:
            asked = {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{number} friends"}],
                "max_tokens": 10 + number,
                "seed": number,
            }
            if number % 2:
                whole = await client.chat.completions.create(**asked)
                assert whole.usage.completion_tokens <= 10 + number
                return str(whole.choices[0].message.content)
            stream = await client.chat.completions.create(**asked, stream=True)
            return "".join([_piece(piece) async for piece in stream])

        texts = await asyncio.gather(*(one(number) for number in range(16)))
        assert all(texts)
        return len(texts)


# ---- EventSource


def use_event_source(server: Address) -> dict[str, int]:
    """The streams, read by a parser of server-sent events; each event is what /openapi.json says."""
    httpx, sse = importlib.import_module("httpx"), importlib.import_module("httpx_sse")
    answers = importlib.import_module("smolcluster.serving.answers")
    counts: dict[str, int] = {}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": STORY}], "stream_options": {"include_usage": True}}
    asked = (
        ("/chat", {"text": STORY}, answers.ChatEvent),
        ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2}, answers.ChatCompletionEvent),
        ("/v1/completions", {"model": MODEL, "prompt": STORY, "logprobs": 2}, answers.CompletionEvent),
    )
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=TIMEOUT) as client:
        for path, body, event_type in asked:
            body = {**body, "stream": True, "max_tokens": 40, "seed": 5}
            with sse.connect_sse(client, "POST", path, json=body) as source:
                source.response.raise_for_status()
                assert source.response.headers["cache-control"] == "no-cache"
                events = [event.data for event in source.iter_sse()]
            if path != "/chat":
                assert events.pop() == "[DONE]"
            for event in events:
                event_type.model_validate_json(event)
            counts[path] = len(events)
            whole = json.loads(events[-1])
            if path == "/chat":
                told = "".join(json.loads(event)["token"] for event in events[:-1])
                assert (whole["full_text"], whole["num_tokens"]) == (told, 40)
    return counts


# ---- WebSocket


def use_websocket(server: Address) -> dict[str, int]:
    """Several requests at once, one cancelled, what is no request, and going in the middle."""
    with _websocket(server) as channel:
        for number in range(6):
            body = {
                "id": str(number),
                "text": f"{STORY} {number}",
                "max_tokens": 30,
                "temperature": 0.7,
                "seed": number,
            }
            channel.send(json.dumps(body))
        channel.send(json.dumps({"id": "long", "text": STORY, "max_tokens": 480, "seed": 1}))
        channel.send(json.dumps({"cancel": "long"}))
        for nonsense in ("nonsense", b"\xff\xfe", "[]", "[" * 100_000, '{"id":"x","text":"\\ud800"}', '{"id":"y"}'):
            channel.send(nonsense)
        texts: dict[str, str] = {}
        ends: dict[str, Any] = {}
        errors = 0
        while len(ends) < 7 or errors < 6:
            event = json.loads(channel.recv(timeout=TIMEOUT))
            if "error" in event:
                assert event["error"]
                errors += 1
            elif event["done"]:
                ends[event["id"]] = event
            else:
                texts[event["id"]] = texts.get(event["id"], "") + event["token"]
    assert all(ends[str(number)]["full_text"] == texts[str(number)] for number in range(6))
    assert ends["long"]["finish_reason"] in ("cancelled", "length")
    for _ in range(5):
        with _websocket(server) as channel:
            for number in range(3):
                channel.send(json.dumps({"id": str(number), "text": STORY, "max_tokens": 480, "seed": number}))
            channel.recv(timeout=TIMEOUT)
    return {"answered": len(ends), "refused": errors, "closed_in_the_middle": 5}


def _websocket(server: Address) -> Any:
    connect = importlib.import_module("websockets.sync.client").connect
    return connect(f"ws://{server.host}:{server.port}/ws", additional_headers=server.headers)


# ---- what a server does


def read_metrics(server: Address) -> tuple[str, dict[str, float]]:
    """The text of /metrics, and its values without those of buckets."""
    httpx = importlib.import_module("httpx")
    parser = importlib.import_module("prometheus_client.parser")
    text = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=30).text
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    values: dict[str, float] = {}
    for sample in samples:
        if "le" not in sample.labels:
            name = sample.name.removeprefix("smolcluster:")
            values[name] = values.get(name, 0.0) + sample.value
    return text, values


def wait_until_free(server: Address, limit: float = 30.0) -> float:
    """Seconds until no request runs or waits."""
    httpx = importlib.import_module("httpx")
    began = time.perf_counter()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while time.perf_counter() < began + limit:
            health = client.get("/health").json()
            if health["running"] == health["waiting"] == 0:
                return time.perf_counter() - began
    raise AssertionError(f"after {limit} s still {health}")
