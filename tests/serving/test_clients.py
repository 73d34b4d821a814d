"""Clients that nobody here wrote, clients that go, and what is wrong.

Short forms of benchmarks/serving_clients.py, which runs on real processes, in one and in stages.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")
pytest.importorskip("httpx")

from models.hf_folders import trained_folder
from serving.bad_requests import BAD, exchange, send_what_is_wrong, signed, slow_clients, status_of
from serving.foreign_clients import Address, use_event_source, use_openai, use_websocket, wait_until_free
from serving.gone_clients import watch_disconnects
from serving.test_api import MODEL, ask, chat, serving
from smolcluster.serving import answers
from smolcluster.serving.requests import Event
from smolcluster.serving.service import Answer, Service

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def folder() -> Path:
    return trained_folder(MODEL)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Service, Address]]:
    with serving(folder, key=KEY, max_concurrent=8, max_queue=16) as (service, port):
        yield service, Address(port, KEY)


@pytest.fixture
def server(served: tuple[Service, Address]) -> Address:
    return served[1]


def test_the_openai_package(server: Address) -> None:
    assert use_openai(server)["async_at_once"] == 16


def test_an_event_source_reads_events_that_are_as_described(server: Address) -> None:
    pytest.importorskip("httpx_sse")
    assert set(use_event_source(server)) == {"/chat", "/v1/chat/completions", "/v1/completions"}


def test_a_websocket_client(server: Address) -> None:
    assert use_websocket(server)["answered"] == 7
    wait_until_free(server)


def test_everything_wrong_is_answered_and_the_server_goes_on(server: Address) -> None:
    assert len(send_what_is_wrong(server)) > 50


def test_who_sends_too_much_can_send_it_and_read_why_it_is_refused(server: Address) -> None:
    """The connection is not reset while something of the body is on its way: that would take the answer with it."""
    for _ in range(5):
        with socket.create_connection((server.host, server.port), timeout=30) as connection:
            connection.sendall(signed(server, BAD["10 MB"][0]))
            with http.client.HTTPResponse(connection) as response:
                response.begin()
                assert response.status == 413
                assert b"4194304 bytes" in response.read()


def test_a_body_of_unknown_length_is_refused_at_once_when_it_is_over(server: Address) -> None:
    body = b"{" + b" " * (4 << 20)
    sent = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent += b"Transfer-Encoding: chunked\r\n\r\n"
    began = time.monotonic()
    status, _ = exchange(server, signed(server, sent) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert status == 413
    assert time.monotonic() - began < 3


def test_slow_clients_hold_nobody_up(server: Address) -> None:
    with slow_clients(server, 60):
        assert status_of(server) == 200


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"text": "x", "stop": list("abcde")}, "stop", "at most 4"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ({"text": "x", "temperature": "hot"}, "temperature", "number"),
        ({}, None, "give text or messages"),
        (b"", None, "no body"),
        (b"{", None, "not JSON"),
        (b'{"text":"\\ud800"}', None, "surrogate"),
    ],
)
def test_the_field_that_is_wrong_is_named_and_why(server: Address, body: Any, param: str | None, says: str) -> None:
    status, _, content = ask(server.port, "POST", "/chat", body, **server.headers)
    assert (status, content["error"]["param"]) == (400, param)
    assert says in content["error"]["message"]


def test_answers_are_as_described(server: Address) -> None:
    described = ask(server.port, "GET", "/openapi.json", **server.headers)[2]
    text = {"model": MODEL, "prompt": "Tom", "max_tokens": 3}
    bodies = {
        ("post", "/v1/chat/completions"): chat("Tom", max_tokens=3, logprobs=True, top_logprobs=1),
        ("post", "/v1/completions"): {**text, "logprobs": 1},
        ("post", "/reconnect"): None,
    }
    kept = {"text": "Tom", "max_tokens": 3, "session_id": "s", "request_id": "r"}
    assert ask(server.port, "POST", "/chat", kept, **server.headers)[0] == 200
    checked = set()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            told = operation["responses"]["200"]["content"].get("application/json")
            if told is None:
                continue
            kind = getattr(answers, told["schema"]["$ref"].rpartition("/")[2])
            asked = path.replace("{model}", MODEL).replace("{session_id}", "s").replace("{request_id}", "r")
            status, _, content = ask(server.port, method.upper(), asked, bodies.get((method, path)), **server.headers)
            assert status == 200, path
            kind.model_validate(content)
            checked.add(operation["operationId"])
    assert checked == {
        "chat_completions", "completions", "models", "model", "config", "health", "reconnect", "cancel", "sessions",
        "session", "delete_session",
    }  # fmt: skip


def test_every_operation_is_described(server: Address) -> None:
    described = ask(server.port, "GET", "/openapi.json", **server.headers)[2]
    operations = [operation for methods in described["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["responses"]["200"]["content"], operation["operationId"]
        assert "422" not in operation["responses"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert named <= set(described["components"]["schemas"])
    assert "HTTPValidationError" not in described["components"]["schemas"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_nothing_is_computed_for_a_client_that_is_known_to_be_gone(
    served: tuple[Service, Address], is_streamed: bool
) -> None:
    service, server = served
    found = watch_disconnects(service, server, 12, is_streamed=is_streamed)
    assert len(found["begun_after"]) == 12
    assert max(found["begun_after"]) <= 1  # that had been put together already


def test_no_task_or_connection_is_left_of_clients_that_went(served: tuple[Service, Address]) -> None:
    psutil = pytest.importorskip("psutil")
    _, server = served
    process = psutil.Process()
    wait_until_free(server)
    before = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    threads = threading.active_count()
    headers = {"Content-Type": "application/json", **server.headers}
    for number in range(20):
        connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
        body = json.dumps({"text": "Once upon a time", "max_tokens": 400}).encode()
        connection.request("POST", "/chat", body, headers)
        if number % 2:
            connection.getresponse().read(20)
        connection.close()
    wait_until_free(server)
    deadline = time.monotonic() + 10
    while (found := process.num_fds() if hasattr(process, "num_fds") else process.num_handles()) > before:
        assert time.monotonic() < deadline, (before, found)
        time.sleep(0.01)
    assert threading.active_count() <= threads + 1  # asyncio's pool of threads may have grown by one


def test_events_that_have_piled_up_leave_the_loop_its_turns() -> None:
    """Else nobody notices meanwhile that the client has gone."""

    class Ready:
        def submit(self, request: Any, on_event: Any) -> int:
            for number in range(20):
                on_event(Event("x", finish_reason="stop" if number == 19 else None))
            return 1

    async def count_turns() -> list[int]:
        turns, found = 0, []

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(take_turns())
        async for _ in Answer(Ready(), None):  # type: ignore[arg-type]
            found.append(turns)
        other.cancel()
        return found

    turns = asyncio.run(count_turns())
    assert all(turns[at + 1] > turns[at] for at in range(19)), turns
