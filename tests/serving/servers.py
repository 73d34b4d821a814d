"""Servers in this process, and clients that ask them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolcluster.config.schema import ServingConfig
from smolcluster.run.serve import listen_http, make_server, make_service
from smolcluster.serving.metrics import ServingMetrics
from smolcluster.serving.service import Service
from smolcluster.serving.sessions import SessionStore

MODEL = "stories260K-hf"


@contextmanager
def serving(
    folder: Path, *, key: str | None = None, store: SessionStore | None = None, **settings: Any
) -> Iterator[tuple[Service, int]]:
    """A server in this process, on a port of its own."""
    metrics = ServingMetrics(MODEL)
    service = make_service(str(folder), ServingConfig(**settings), dtype="fp32", observer=metrics)
    with running(make_server(service, "127.0.0.1", key=key, metrics=metrics, store=store), service) as port:
        yield service, port


@contextmanager
def running(server: Any, service: Service) -> Iterator[int]:
    """The port at which uvicorn's server answers, in a thread."""
    listener = listen_http("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()
        assert not thread.is_alive()


def slow_down(service: Service, seconds: float) -> None:
    """Let every step take so long, as with a larger model."""
    executor: Any = service.engine.replicas[0]._executor
    submit = executor.submit

    def slow(batch: Any) -> None:
        time.sleep(seconds)
        submit(batch)

    executor.submit = slow


def wait_until(is_so: Callable[[], object], seconds: float = 20) -> None:
    """Until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of a whole answer."""
    with asking(port, method, path, body, **headers) as response:
        content = response.read()
    kind = response.headers.get_content_type()
    return response.status, dict(response.headers), json.loads(content) if kind == "application/json" else content


@contextmanager
def asking(port: int, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """An answer that can be read piece by piece; the connection is closed at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if raw is not None else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, raw, given)
        response = connection.getresponse()
        yield response
    finally:
        connection.close()
        response.close()


def events_of(response: http.client.HTTPResponse) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Server-sent events with their ids, as they come."""
    number = None
    for line in response:
        if line.startswith(b"id: "):
            number = int(line.removeprefix(b"id: "))
        elif line.startswith(b"data: "):
            yield number, json.loads(line.removeprefix(b"data: "))
            number = None
