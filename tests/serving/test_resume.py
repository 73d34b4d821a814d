"""Sessions over HTTP: answers that live on without their connection, and conversations that outlive the server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.hf_folders import trained_folder
from serving.servers import MODEL, ask, asking, events_of, running, serving, slow_down, wait_until
from smolcluster.config.schema import ServingConfig
from smolcluster.run.serve import make_service
from smolcluster.serving.metrics import ServingMetrics
from smolcluster.serving.service import Service
from smolcluster.serving.sessions import SessionStore

client_of = pytest.importorskip("websockets.sync.client")
uvicorn = pytest.importorskip("uvicorn")
KEYS = ("the-first-key", "the-second-key")
# With the model's own 0.5 ms a step no answer would be under way for long.
STEP_SECONDS = 0.01


@pytest.fixture(scope="module")
def folder() -> Path:
    return trained_folder(MODEL)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Service, int]]:
    with serving(folder, max_concurrent=4, max_queue=4) as found:
        slow_down(found[0], STEP_SECONDS)
        yield found


@pytest.fixture
def service(served: tuple[Service, int]) -> Service:
    return served[0]


@pytest.fixture
def port(served: tuple[Service, int]) -> int:
    return served[1]


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "_", request.node.name)[:64]


def say(session: str | None, text: str = "Once upon a time", tokens: int = 20, **more: Any) -> dict[str, Any]:
    given = {} if session is None else {"session_id": session}
    return {"text": text, "max_tokens": tokens, "temperature": 0.8, "seed": 3, **given, **more}


def chat(port: int, body: dict[str, Any], **headers: str) -> list[tuple[int | None, dict[str, Any]]]:
    """All events of an answer."""
    with asking(port, "POST", "/chat", body, **headers) as response:
        assert response.status == 200, response.read()
        return list(events_of(response))


def full_text(port: int, body: dict[str, Any]) -> str:
    return str(chat(port, body)[-1][1]["full_text"])


def begin(port: int, body: dict[str, Any], count: int = 3, **headers: str) -> tuple[str, list[Any]]:
    """The request_id and the first events of an answer, whose connection is closed then."""
    with asking(port, "POST", "/chat", body, **headers) as response:
        assert response.status == 200, response.read()
        found = events_of(response)
        return response.headers["X-Request-Id"], [next(found) for _ in range(count)]


def follow(port: int, request_id: str, after: int, **headers: str) -> list[Any]:
    with asking(port, "GET", f"/chat/{request_id}/events", Last_Event_ID=str(after), **headers) as response:
        assert response.status == 200, response.read()
        assert response.headers["X-Request-Id"] == request_id
        return list(events_of(response))


def conversation(port: int, session: str, **headers: str) -> tuple[list[tuple[str, str, str | None]], str | None]:
    status, _, content = ask(port, "GET", f"/sessions/{session}", **headers)
    assert status == 200, content
    found = [(message["role"], message["content"], message["finish_reason"]) for message in content["messages"]]
    return found, content["running"]


# ---- answers that go on


def test_an_answer_of_a_session_is_that_of_a_plain_request_with_numbers(port: int, session: str) -> None:
    events = chat(port, say(session, request_id="my-own-id"))
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert {event["request_id"] for _, event in events} == {"my-own-id"}
    last = events[-1][1]
    assert "".join(event.get("token", "") for _, event in events) == last["full_text"]
    assert last["full_text"] == full_text(port, say(None))
    assert (last["done"], last["num_tokens"], last["finish_reason"]) == (True, 20, "length")
    assert conversation(port, session) == (
        [("user", "Once upon a time", None), ("assistant", last["full_text"], "length")],
        None,
    )


def test_an_answer_whose_client_went_goes_on_and_no_event_is_lost(port: int, session: str) -> None:
    request_id, first = begin(port, say(session, tokens=60))
    found, is_running = conversation(port, session)
    assert is_running == request_id
    assert found[-1][::2] == ("assistant", None)
    events = first + follow(port, request_id, 3)
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    undisturbed = full_text(port, say(None, tokens=60))
    assert "".join(event.get("token", "") for _, event in events) == undisturbed
    assert events[-1][1]["full_text"] == undisturbed
    assert conversation(port, session)[0][-1] == ("assistant", undisturbed, "length")


def test_an_answer_that_has_ended_can_be_gone_on_with_after_every_event(port: int, session: str) -> None:
    events = chat(port, say(session, tokens=12, request_id="ended"))
    for after in range(len(events)):
        assert follow(port, "ended", after) == events[after:]
    with asking(port, "GET", "/chat/ended/events?after=5") as response:
        assert list(events_of(response)) == events[5:]
    with asking(port, "GET", "/chat/ended/events?after=2", Last_Event_ID="7") as response:
        assert list(events_of(response)) == events[7:]
    assert ask(port, "GET", "/chat/ended/events", Last_Event_ID=str(len(events)))[::2] == (204, b"")
    for wrong in ("99", "-1", "x", "1.5", "9" * 5000):
        assert ask(port, "GET", "/chat/ended/events", Last_Event_ID=wrong)[0] == 400
    assert ask(port, "GET", "/chat/ended/events?after=-1")[0] == 400


def test_several_listeners_hear_all_of_it_each_at_its_pace(port: int, session: str) -> None:
    request_id, first = begin(port, say(session, tokens=80), count=10)
    heard: dict[int, list[Any]] = {}

    def listen(after: int) -> None:
        heard[after] = follow(port, request_id, after)

    threads = [threading.Thread(target=listen, args=(after,)) for after in (0, 4, 9, 10)]
    for thread in threads:
        thread.start()
    with asking(port, "GET", f"/chat/{request_id}/events") as lazy:  # reads nothing until all others have ended
        for thread in threads:
            thread.join(30)
        whole = list(events_of(lazy))
    assert whole[:10] == first
    assert whole[-1][1]["done"] is True
    assert heard == {after: whole[after:] for after in (0, 4, 9, 10)}


def test_who_listens_keeps_it_going_and_who_is_gone_for_too_long_ends_it(folder: Path) -> None:
    with serving(folder, max_concurrent=1, resume_s=0.4) as (service, port):
        slow_down(service, STEP_SECONDS)
        events = chat(port, say("long", tokens=100))  # takes longer than resume_s
        assert events[-1][1]["finish_reason"] == "length"
        request_id, _ = begin(port, say("left", tokens=480))
        wait_until(lambda: not service.engine.running)
        wait_until(lambda: conversation(port, "left")[1] is None)
        (_, text, finish_reason) = conversation(port, "left")[0][-1]
        assert finish_reason == "cancelled"
        assert text
        beginning = full_text(port, say(None, tokens=100))
        assert beginning.startswith(text[: len(beginning)])
        wait_until(lambda: ask(port, "GET", f"/chat/{request_id}/events")[0] == 404)
        assert ask(port, "DELETE", f"/chat/{request_id}")[0] == 404
        chat(port, say("left", "And then?", tokens=4, request_id=request_id))  # its id is free again


def test_one_listener_is_enough_to_keep_an_answer_going(folder: Path) -> None:
    with serving(folder, max_concurrent=1, resume_s=1) as (service, port):
        slow_down(service, STEP_SECONDS)
        request_id, _ = begin(port, say("s", tokens=250))
        with asking(port, "GET", f"/chat/{request_id}/events") as whole:
            with asking(port, "GET", f"/chat/{request_id}/events") as other:
                next(events_of(other))
            assert list(events_of(whole))[-1][1]["finish_reason"] == "length"


def test_with_no_time_to_resume_an_answer_ends_with_its_connection(folder: Path) -> None:
    with serving(folder, max_concurrent=1, resume_s=0) as (service, port):
        slow_down(service, STEP_SECONDS)
        assert chat(port, say("s"))[-1][1]["finish_reason"] == "length"
        begin(port, say("s", tokens=400))
        wait_until(lambda: not service.engine.running)


def test_delete_ends_an_answer_and_frees_its_slot(service: Service, port: int, session: str) -> None:
    request_id, first = begin(port, say(session, tokens=480))
    status, _, last = ask(port, "DELETE", f"/chat/{request_id}")
    assert (status, last["finish_reason"], last["request_id"], last["session_id"]) == (
        200,
        "cancelled",
        request_id,
        session,
    )
    assert service.engine.running == 0
    assert last["full_text"].startswith("".join(event["token"] for _, event in first))
    assert conversation(port, session) == (
        [("user", "Once upon a time", None), ("assistant", last["full_text"], "cancelled")],
        None,
    )
    assert ask(port, "DELETE", f"/chat/{request_id}")[2] == last
    assert follow(port, request_id, 3)[-1][1]["full_text"] == last["full_text"]
    assert ask(port, "DELETE", "/chat/unknown")[0] == 404
    assert ask(port, "GET", "/chat/unknown/events")[0] == 404


@pytest.mark.parametrize("path", ["chat", "ws"])
def test_a_plain_request_still_ends_with_its_connection(service: Service, port: int, path: str) -> None:
    body = say(None, tokens=480)
    if path == "chat":
        with asking(port, "POST", "/chat", body) as response:
            assert next(events_of(response))[0] is None
            assert "X-Request-Id" not in response.headers
            assert service.engine.running == 1
    else:
        with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
            socket.send(json.dumps(body))
            assert set(json.loads(socket.recv(timeout=30))) == {"id", "token", "done"}
            assert service.engine.running == 1
    wait_until(lambda: not service.engine.running, 5)


def test_a_client_that_reads_nothing_holds_nobody_up(service: Service, port: int, session: str) -> None:
    with asking(port, "POST", "/chat", say(session, tokens=100)):
        assert full_text(port, say(None)) == full_text(port, say(None))
        wait_until(lambda: not service.engine.running)
        wait_until(lambda: conversation(port, session)[1] is None)


# ---- turns


def test_a_conversation_is_the_prompt_and_messages_take_its_place(port: int, session: str) -> None:
    first = full_text(port, say(session))
    asked = [{"role": "user", "content": "Once upon a time"}, {"role": "assistant", "content": first}]
    second = full_text(port, say(session, "And then?"))
    asked.append({"role": "user", "content": "And then?"})
    plain = {"max_tokens": 20, "temperature": 0.8, "seed": 3}
    assert second == full_text(port, {"messages": asked, **plain})
    other = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": [{"type": "text", "text": "Tom"}]}]
    third = full_text(port, {"messages": other, "session_id": session, **plain})
    assert third == full_text(port, {"messages": other, **plain})
    assert conversation(port, session)[0] == [
        ("system", "Be brief", None),
        ("user", "Tom", None),
        ("assistant", third, "length"),
    ]


def test_a_session_answers_once_at_a_time(port: int, session: str) -> None:
    request_id, _ = begin(port, say(session, tokens=480))
    status, _, content = ask(port, "POST", "/chat", say(session, "Me too"))
    assert (status, content["error"]["code"]) == (409, "answer_under_way")
    assert session in content["error"]["message"]
    status, _, content = ask(port, "POST", "/chat", say(f"{session}2", "x", request_id=request_id))
    assert (status, content["error"]["code"]) == (409, "request_id_in_use")
    with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
        socket.send(json.dumps({"id": "a", **say(session)}))
        assert "under way" in json.loads(socket.recv(timeout=30))["error"]
    ask(port, "DELETE", f"/chat/{request_id}")
    for _ in range(5):  # free as soon as its end was told
        chat(port, say(session, "Tom", tokens=2))
    assert len(conversation(port, session)[0]) == 12


def test_of_a_turn_that_is_refused_nothing_is_stored(folder: Path) -> None:
    with serving(folder, max_concurrent=1, max_queue=0) as (service, port):
        slow_down(service, STEP_SECONDS)
        chat(port, say("s", tokens=4))
        before = ask(port, "GET", "/sessions/s")[2], ask(port, "GET", "/sessions")[2]
        long = [{"role": "user", "content": "word " * 600}]
        for body in (
            say("s", "word " * 600),
            say("s", tokens=511),
            say("new", "word " * 600),
            {"messages": long, "session_id": "s"},
            {"messages": [{"role": "user", "content": "Tom"}], "session_id": "s", "max_tokens": 512},
        ):
            status, _, content = ask(port, "POST", "/chat", body)
            assert (status, content["error"]["code"]) == (400, "context_length_exceeded")
        request_id, _ = begin(port, say("other", tokens=480))
        assert ask(port, "POST", "/chat", say("s"))[0] == 429
        assert ask(port, "POST", "/chat", say("new"))[0] == 429
        ask(port, "DELETE", f"/chat/{request_id}")
        ask(port, "DELETE", "/sessions/other")
        assert (ask(port, "GET", "/sessions/s")[2], ask(port, "GET", "/sessions")[2]) == before
        assert ask(port, "GET", "/sessions/new")[0] == 404
        chat(port, say("s", tokens=4))


@pytest.mark.parametrize(
    "more",
    [
        {"session_id": "a/b"},
        {"session_id": ""},
        {"session_id": "x" * 65},
        {"session_id": "a\n"},
        {"session_id": "s", "request_id": "ü"},
        {"request_id": "without-a-session"},
    ],
)
def test_ids_are_checked(port: int, more: dict[str, Any]) -> None:
    status, _, content = ask(port, "POST", "/chat", say(None, **more))
    assert (status, content["error"]["type"]) == (400, "invalid_request_error")


# ---- over a WebSocket


def test_answers_over_a_websocket_can_be_left_resumed_and_cancelled(service: Service, port: int, session: str) -> None:
    events: list[dict[str, Any]] = []
    with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
        socket.send(json.dumps({"id": "a", **say(session, tokens=60, request_id="over-ws")}))
        events += [json.loads(socket.recv(timeout=30)) for _ in range(4)]
        assert {(event["id"], event["request_id"]) for event in events} == {("a", "over-ws")}
    with client_of.connect(f"ws://127.0.0.1:{port}/ws") as socket:
        socket.send(json.dumps({"resume": "over-ws", "after": 4}))
        while not events[-1]["done"]:
            events.append(json.loads(socket.recv(timeout=30)))
        assert [event["event_id"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["id"] == "over-ws"
        assert events[-1]["full_text"] == full_text(port, say(None, tokens=60))
        socket.send(json.dumps({"resume": "over-ws", "after": 99}))
        assert "no event 99" in json.loads(socket.recv(timeout=30))["error"]
        socket.send(json.dumps({"resume": "unknown"}))
        assert "unknown" in json.loads(socket.recv(timeout=30))["error"]
        socket.send(json.dumps({"resume": "over-ws", "after": -1}))
        assert "after" in json.loads(socket.recv(timeout=30))["error"]
        for named in ("b", "by-request-id"):
            asked = say(session, "Tom", tokens=300, request_id="by-request-id" if named != "b" else None)
            socket.send(json.dumps({"id": "b", **asked}))
            assert not json.loads(socket.recv(timeout=30))["done"]
            socket.send(json.dumps({"cancel": named}))
            while not (event := json.loads(socket.recv(timeout=30)))["done"]:
                pass
            assert event["finish_reason"] == "cancelled"
    assert service.engine.running == 0


# ---- sessions


def test_sessions_are_listed_and_forgotten(folder: Path) -> None:
    with serving(folder, max_concurrent=2) as (service, port):
        slow_down(service, STEP_SECONDS)
        for number in range(5):
            chat(port, say(f"s{number}", f"{number} " + "x" * 70, tokens=2))
        chat(port, say("s1", "again", tokens=2))
        first = ask(port, "GET", "/sessions?limit=3")[2]["sessions"]
        assert [(entry["id"], entry["count"]) for entry in first] == [("s1", 4), ("s4", 2), ("s3", 2)]
        assert first[0]["title"] == ("1 " + "x" * 70)[:60]
        rest = ask(port, "GET", f"/sessions?limit=3&before={first[-1]['updated']!r}")[2]["sessions"]
        assert [entry["id"] for entry in rest] == ["s2", "s0"]
        assert ask(port, "GET", "/sessions?limit=0")[0] == 400
        request_id, _ = begin(port, say("s2", tokens=300))
        assert ask(port, "DELETE", "/sessions/s2")[::2] == (200, {"id": "s2", "deleted": True})
        assert service.engine.running == 0
        assert ask(port, "GET", "/sessions/s2")[0] == 404
        assert ask(port, "DELETE", "/sessions/s2")[0] == 404
        assert ask(port, "GET", f"/chat/{request_id}/events")[0] == 404
        assert len(ask(port, "GET", "/sessions")[2]["sessions"]) == 4


def test_the_guard_stands_before_sessions(folder: Path) -> None:
    with serving(folder, key=KEYS[0], max_concurrent=1) as (_, port):
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        chat(port, say("s", tokens=2, request_id="r"), **key)
        for method, path in (
            ("GET", "/sessions"),
            ("GET", "/sessions/s"),
            ("DELETE", "/sessions/s"),
            ("GET", "/chat/r/events"),
            ("DELETE", "/chat/r"),
        ):
            assert ask(port, method, path)[0] == 401
            assert ask(port, method, path, Host="evil.example", **key)[0] == 403
            if method == "DELETE":
                assert ask(port, method, path, Origin="http://evil.example", **key)[0] == 403
        assert ask(port, "GET", "/sessions/s", **key)[0] == 200


@contextmanager
def serving_two_keys(folder: Path) -> Iterator[tuple[Service, int]]:
    """Two guards before the same conversations; the key says which."""
    from smolcluster.serving.app import make_app
    from smolcluster.serving.conversations import Conversations
    from smolcluster.serving.guard import Guard

    metrics = ServingMetrics(MODEL)
    service = make_service(str(folder), ServingConfig(max_concurrent=2), observer=metrics)
    conversations = Conversations(service, SessionStore())
    apps = {key: make_app(service, Guard({"127.0.0.1"}, key), metrics, conversations) for key in KEYS}

    async def either(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        key = headers.get(b"authorization", b"").decode().removeprefix("Bearer ")
        await apps.get(key, apps[KEYS[0]])(scope, receive, send)

    with running(uvicorn.Server(uvicorn.Config(either, log_level="warning")), service) as port:
        yield service, port


def test_what_belongs_to_another_key_is_not_there(folder: Path) -> None:
    mine, yours = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    with serving_two_keys(folder) as (service, port):
        slow_down(service, STEP_SECONDS)
        request_id, _ = begin(port, say("s", tokens=300, request_id="r"), **mine)
        assert ask(port, "GET", f"/chat/{request_id}/events", **yours)[0] == 404
        assert ask(port, "DELETE", f"/chat/{request_id}", **yours)[0] == 404
        assert ask(port, "GET", "/sessions/s", **yours)[0] == 404
        assert ask(port, "DELETE", "/sessions/s", **yours)[0] == 404
        assert ask(port, "GET", "/sessions", **yours)[2] == {"sessions": []}
        own = chat(port, say("s", "Tom", tokens=2, request_id="r"), **yours)[-1][1]  # one of the same name
        assert conversation(port, "s", **yours)[0] == [("user", "Tom", None), ("assistant", own["full_text"], "length")]
        assert conversation(port, "s", **mine)[1] == request_id
        assert ask(port, "DELETE", f"/chat/{request_id}", **mine)[0] == 200


# ---- ends


def test_a_server_that_is_told_to_end_stores_what_is_under_way(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sessions.sqlite"
    with SessionStore(file) as store, serving(folder, store=store, max_concurrent=1) as (service, port):
        slow_down(service, STEP_SECONDS)
        begin(port, say("s", tokens=480))
    assert [found.name for found in tmp_path.iterdir()] == [file.name]  # closed
    with SessionStore(file) as store:
        messages = store.messages("", "s")
        assert messages is not None
        assert messages[-1].finish_reason == "interrupted"
        assert messages[-1].content


def test_a_file_that_fails_costs_no_listener_its_answer(folder: Path) -> None:
    store = SessionStore()
    with serving(folder, store=store, max_concurrent=1) as (service, port):
        slow_down(service, STEP_SECONDS)
        request_id, first = begin(port, say("s", tokens=40))
        store.close()
        assert (first + follow(port, request_id, 3))[-1][1]["full_text"] == full_text(port, say(None, tokens=40))
        status, _, content = ask(port, "POST", "/chat", say("s"))
        assert (status, content["error"]["code"]) == (500, "sessions_failed")


# A model that takes its time: 20 ms a step.
SLOW_SERVER = """
import time
from smolcluster.serving.executor import LocalExecutor
submit = LocalExecutor.submit
LocalExecutor.submit = lambda self, batch: (time.sleep(0.02), submit(self, batch))[1]
from smolcluster.cli import main
main()
"""


@contextmanager
def server_process(folder: Path, file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`smolcluster serve`, and its port."""
    options = ["--model", folder, "--port", 0, "--override", f"serving.sessions_file={file}"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, "serve", *map(str, options)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"is served at http://[^:]+:(\d+);", line)
        assert found, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_conversation_outlives_a_server_that_is_killed(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sessions.sqlite"
    with server_process(folder, file) as (process, port):
        chat(port, say("s", tokens=4))
        with asking(port, "POST", "/chat", say("s", "And then?", tokens=400)) as response:
            events = events_of(response)
            next(events)
            wait_until(lambda: conversation(port, "s")[0][-1][1])  # the first second is stored
            process.kill()
            process.wait(30)
    with server_process(folder, file) as (_, port):
        messages, is_running = conversation(port, "s")
        assert is_running is None
        assert [(role, reason) for role, _, reason in messages] == [
            ("user", None),
            ("assistant", "length"),
            ("user", None),
            ("assistant", "interrupted"),
        ]
        partial = messages[-1][1]
        asked = [{"role": role, "content": text} for role, text, _ in messages]
        plain = {"temperature": 0.8, "seed": 3}
        assert partial
        beginning = full_text(port, {"messages": asked[:-1], "max_tokens": 100, **plain})
        assert beginning.startswith(partial[: len(beginning)])
        went_on = full_text(port, say("s", "Go on", tokens=8))
        asked.append({"role": "user", "content": "Go on"})
        assert went_on == full_text(port, {"messages": asked, "max_tokens": 8, **plain})
        assert conversation(port, "s")[0][-1] == ("assistant", went_on, "length")
