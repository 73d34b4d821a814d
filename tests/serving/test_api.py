"""The HTTP interface, asked by clients that nobody here wrote: the openai package, a WebSocket client, http.client."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.hf_folders import trained_folder
from serving.servers import MODEL, ask, serving, slow_down
from smolcluster.serving.service import Service

openai = pytest.importorskip("openai")
client_of = pytest.importorskip("websockets.sync.client")
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def folder() -> Path:
    return trained_folder(MODEL)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Service, int]]:
    with serving(folder, max_concurrent=4, max_queue=4) as found:
        yield found


@pytest.fixture
def port(served: tuple[Service, int]) -> int:
    return served[1]


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def ask_in_pieces(port: int, nbytes: int) -> int:
    """A body whose length nobody says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        with contextlib.suppress(OSError):  # the server need not read all of it
            pieces = (b"x" * min(65536, nbytes - at) for at in range(0, nbytes, 65536))
            connection.request("POST", "/chat", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
        return connection.getresponse().status
    finally:
        connection.close()


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_streams_have_openais_shape_and_add_up_to_the_whole_answer(client: Any) -> None:
    asked = chat("Once upon a time", max_tokens=30, temperature=0.8, seed=3)
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 30, 35)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *told, last = chunks
    assert (last.choices, last.usage.total_tokens) == ([], 35)
    assert [chunk.choices[0].delta.role for chunk in told] == ["assistant"] + [None] * (len(told) - 1)
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["length"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content


def test_plain_completions_and_stop_strings(client: Any) -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0]
    assert whole.finish_reason == "length"
    stop = whole.text[20:26]
    cut = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == cut.text
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "stop"


def test_logprobs(client: Any) -> None:
    asked = chat("Once upon a time", max_tokens=6, temperature=0)
    content = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.logprob == entry.top_logprobs[0].logprob  # the likeliest was taken
    old = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2).choices[0].logprobs
    assert [len(values) for values in (old.tokens, old.token_logprobs, old.top_logprobs, old.text_offset)] == [4] * 4


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (chat("x", temperature=-1), 400, "temperature", None),
        (chat("x", top_p=0), 400, "top_p", None),
        (chat("x", repetition_penalty=1e-30), 400, "repetition_penalty", None),
        (chat("x", max_tokens=10_000), 400, "messages", "context_length_exceeded"),
        (chat("word " * 600), 400, "messages", "context_length_exceeded"),
        (chat("x") | {"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"model": MODEL, "messages": []}, 400, "messages", None),
        ({"model": MODEL}, 400, "messages", None),
        (b"{not json", 400, None, None),
        (b"[1, 2]", 400, None, None),
    ],
)
def test_what_is_wrong_is_said_in_openais_error_object(
    port: int, body: Any, status: int, param: str | None, code: str | None
) -> None:
    found, _, content = ask(port, "POST", "/v1/chat/completions", body)
    assert found == status
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"]
    assert content["error"]["code"] == code
    if param is not None:
        assert content["error"]["param"] == param


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1e-40},
        {"n": None, "stream": None, "presence_penalty": None, "frequency_penalty": None, "stop": None},
        {"seed": -1},
        {"temperature": 2, "top_p": 1e-9, "repetition_penalty": 0.1, "min_p": 1},
    ],
)
def test_what_is_odd_but_allowed_is_answered(port: int, more: dict[str, Any]) -> None:
    status, _, content = ask(port, "POST", "/v1/chat/completions", chat("Tom", max_tokens=4, **more))
    assert status == 200, content
    assert content["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(("path", "allowed"), [("/sessions/a", "DELETE, GET"), ("/chat", "POST"), ("/health", "GET")])
def test_a_method_that_is_not_there_is_told_which_are(port: int, path: str, allowed: str) -> None:
    status, headers, content = ask(port, "PUT", path, {})
    assert (status, headers["allow"]) == (405, allowed)
    assert content["error"]["type"] == "invalid_request_error"


def test_a_prompt_of_ids_that_the_model_does_not_have(port: int) -> None:
    status, _, content = ask(port, "POST", "/v1/completions", {"model": MODEL, "prompt": [1, 512], "max_tokens": 2})
    assert (status, "0 to 511" in content["error"]["message"]) == (400, True)
    assert ask(port, "POST", "/v1/completions", {"model": MODEL, "prompt": [1, 511], "max_tokens": 2})[0] == 200


def test_what_a_guard_turns_away(port: int) -> None:
    body = {"text": "Tom", "max_tokens": 2}
    assert ask(port, "POST", "/chat", body)[0] == 200
    assert ask(port, "POST", "/chat", body, Host="evil.example")[0] == 403
    assert ask(port, "POST", "/chat", body, Origin="http://evil.example")[0] == 403
    assert ask(port, "POST", "/chat", body, Origin=f"http://localhost:{port}")[0] == 200
    assert ask(port, "POST", "/chat", body, Host="192.0.2.7:80")[0] == 200
    assert ask(port, "POST", "/chat", body, Origin="http://192.0.2.7")[0] == 403
    assert ask(port, "POST", "/chat", body, Origin="http://[::1")[0] == 403
    assert ask(port, "POST", "/chat", json.dumps(body).encode(), Content_Type="text/plain")[0] == 415
    assert ask(port, "POST", "/chat", {"text": "x" * (10 << 20)})[0] == 413
    assert ask_in_pieces(port, 10 << 20) == 413
    assert ask_in_pieces(port, 100) == 400  # no JSON
    assert ask(port, "GET", "/nowhere")[0] == 404
    with pytest.raises(Exception, match=r"403|1008|rejected"):
        client_of.connect(f"ws://127.0.0.1:{port}/ws", additional_headers={"Origin": "http://evil.example"}).close()


def test_a_key_is_asked_for_everywhere_but_at_health(folder: Path) -> None:
    with serving(folder, key=KEY, max_concurrent=1) as (_, port):
        assert ask(port, "GET", "/health")[0] == 200
        status, _, content = ask(port, "GET", "/v1/models")
        assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert ask(port, "GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        assert ask(port, "GET", "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
        stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_chat_events(port: int) -> None:
    _, headers, content = ask(port, "POST", "/chat", {"text": "Tom", "max_tokens": 12, "temperature": 0})
    assert headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in content.decode().split("\n\n") if line]
    *pieces, last = events
    assert all(set(piece) == {"token", "done"} and piece["done"] is False for piece in pieces)
    assert "".join(piece["token"] for piece in pieces) == last["full_text"]
    assert (last["done"], last["num_tokens"]) == (True, 12)
    assert 0 < last["time_to_first_token_ms"] <= last["total_time_ms"]
    assert last["tokens_per_second"] > 0


@pytest.mark.parametrize("path", ["chat", "ws"])
def test_times_begin_with_the_request_and_are_the_engines(folder: Path, path: str) -> None:
    """With 30 ms a step: the first token is there after one, and nine more take nine."""
    with serving(folder, max_concurrent=1) as (service, port):
        slow_down(service, 0.03)
        body = {"id": "a", "text": "Tom", "max_tokens": 10, "temperature": 0}
        if path == "chat":
            content = ask(port, "POST", "/chat", body)[2].decode()
            last = json.loads(content.strip().split("\n\n")[-1].removeprefix("data: "))
        else:
            with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
                socket.send(json.dumps(body))
                while not (last := json.loads(socket.recv(timeout=30)))["done"]:
                    pass
    assert last["time_to_first_token_ms"] >= 30
    assert last["total_time_ms"] >= 300
    assert last["tokens_per_second"] <= 9 / 0.27


def test_several_requests_over_one_websocket(port: int) -> None:
    with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
        socket.send(json.dumps({"id": "a", "text": "Tom", "max_tokens": 20, "temperature": 0}))
        socket.send(json.dumps({"id": "b", "text": "Lily", "max_tokens": 400, "temperature": 0}))
        socket.send(json.dumps({"cancel": "b"}))
        socket.send("nonsense")
        socket.send("[" * 100_000)
        socket.send(b"{}")
        socket.send(json.dumps({"id": "\ud800", "text": "Tom"}))
        socket.send(json.dumps({"id": "c", "text": "Tom", "temperature": -1}))
        texts, ends, errors = {"a": "", "b": ""}, {}, []
        while len(ends) < 3 or len(errors) < 4:
            event = json.loads(socket.recv(timeout=30))
            if event["done"] and event["id"] in ("a", "b", "c"):
                ends[event["id"]] = event
            elif event["done"]:
                errors.append(event["error"])
            else:
                texts[event["id"]] += event["token"]
    assert ends["a"]["full_text"] == texts["a"]
    assert 0 < ends["a"]["time_to_first_token_ms"] < ends["a"]["total_time_ms"]
    assert ends["b"]["finish_reason"] == "cancelled"
    assert "temperature" in ends["c"]["error"]
    assert all(errors)


def test_a_full_queue_answers_429_and_every_other_request_is_answered(served: tuple[Service, int]) -> None:
    _, port = served
    found: list[tuple[int, dict[str, str]]] = []

    def one(number: int) -> None:
        status, headers, _ = ask(port, "POST", "/v1/chat/completions", chat(f"Tom {number}", max_tokens=60))
        found.append((status, headers))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, _ in found]
    assert len(statuses) == 40
    assert set(statuses) == {200, 429}
    assert 8 <= statuses.count(200) < 40
    assert all("retry-after" in headers for status, headers in found if status == 429)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_frees_its_slot(served: tuple[Service, int], is_streamed: bool) -> None:
    service, port = served
    finished = service.engine.counts.finished.get("cancelled", 0)
    body = json.dumps(chat("Once upon a time", max_tokens=480, stream=is_streamed, seed=1)).encode()
    for _ in range(10):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        while not service.engine.running:
            time.sleep(0.001)
        connection.close()
        deadline = time.monotonic() + 10
        while service.engine.running and time.monotonic() < deadline:
            time.sleep(0.001)
        assert service.engine.running == 0
    assert service.engine.counts.finished.get("cancelled", 0) > finished


def test_config_and_health(port: int) -> None:
    content = ask(port, "GET", "/config")[2]
    assert (content["model"], content["ctx_length"], content["max_queue"], content["split"]) == (MODEL, 512, 4, [5])
    assert ask(port, "GET", "/health")[2]["status"] == "ok"


def test_metrics_are_prometheus_text_and_count(port: int, client: Any) -> None:
    parser = pytest.importorskip("prometheus_client.parser")

    def read() -> dict[str, float]:
        text = ask(port, "GET", "/metrics")[2].decode()
        samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
        assert all(sample.labels["model_name"] == MODEL for sample in samples)
        return {sample.name: sample.value for sample in samples if "le" not in sample.labels}

    before = read()
    client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=9)
    after = read()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["smolcluster:generation_tokens_total"] == 9
    assert grown["smolcluster:prompt_tokens_total"] == 5
    assert grown["smolcluster:time_to_first_token_seconds_count"] == 1
    assert grown["smolcluster:inter_token_latency_seconds_count"] == 8
    assert grown["smolcluster:e2e_request_latency_seconds_count"] == 1
    assert after["smolcluster:num_requests_running"] == 0
