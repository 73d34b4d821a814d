"""What is still computed for a client that has gone.

The loop notices that a connection is closed, and cancels the request. "Within one token": from then on no step is put
together that has this request. At most one was under way or about to be, and when it is done the slot is free.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from serving.foreign_clients import MODEL, STORY, Address, wait_until_free
from smolcluster.serving.service import Service


def watch_disconnects(service: Service, server: Address, count: int, *, is_streamed: bool) -> dict[str, list[float]]:
    """Ask and go, one client after the other, each a few tokens later than the last.

    Returns:
        For each client: `begun_after`, steps that began after the request was cancelled; `free_ms` from then until its
        slot was free; `token_ms`, what a token of it took.
    """
    engine, replica = service.engine, service.engine.replicas[0]
    submit, cancel, finish = replica._executor.submit, engine.cancel, replica._finish
    begun: list[float] = []
    cancelled: list[tuple[int, float]] = []
    ended: list[float] = []

    def noted_submit(batch: Any) -> None:
        begun.append(time.perf_counter())
        submit(batch)

    def noted_cancel(number: int) -> None:
        with engine._queue.news:
            cancel(number)
            cancelled.append((len(begun), time.perf_counter()))

    def noted_finish(*arguments: Any, **named: Any) -> None:
        finish(*arguments, **named)
        ended.append(time.perf_counter())

    body = json.dumps(
        {"model": MODEL, "prompt": STORY, "max_tokens": 480, "stream": is_streamed, "seed": 1, "temperature": 0.9}
    )
    headers = {"Content-Type": "application/json", **server.headers}
    found: dict[str, list[float]] = {"begun_after": [], "free_ms": [], "token_ms": []}
    wait_until_free(server)
    replica._executor.submit, engine.cancel, replica._finish = (  # type: ignore[method-assign]
        noted_submit,
        noted_cancel,
        noted_finish,
    )
    try:
        for number in range(count):
            begun.clear(), cancelled.clear(), ended.clear()
            connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
            connection.request("POST", "/v1/completions", body, headers)
            wanted, deadline = 2 + number % 60, time.monotonic() + 30
            while len(begun) < wanted and time.monotonic() < deadline:
                time.sleep(0.0002)
            connection.close()
            wait_until_free(server)
            at, moment = cancelled[0]
            found["begun_after"].append(len(begun) - at)
            found["free_ms"].append(1000 * max(0.0, ended[0] - moment))
            found["token_ms"].append(1000 * (begun[-1] - begun[0]) / max(1, len(begun) - 1))
    finally:
        del engine.cancel, replica._finish
        replica._executor.submit = submit  # type: ignore[method-assign]
    return found
