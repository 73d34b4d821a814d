"""Requests that are wrong in some way, as bytes, and how they are answered."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from serving.foreign_clients import MODEL, Address
from smolcluster.serving.answers import ErrorAnswer


def _post(body: bytes, path: str = "/chat", more: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST %s HTTP/%s\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head % (path.encode(), version) + b"Content-Length: %d\r\n%s\r\n" % (len(body), more) + body


def _get(target: bytes, more: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%s %s HTTP/%s\r\nHost: localhost\r\nConnection: close\r\n%s\r\n" % (method, target, version, more)


_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_ASK = b'{"text":"Tom","max_tokens":2'

# Name → (bytes, statuses that answer it; 0: the connection is closed).
BAD: dict[str, tuple[bytes, set[int]]] = {
    "negative temperature": (_post(_ASK + b',"temperature":-1}'), {400}),
    "NaN": (_post(_ASK + b',"temperature":NaN}'), {400}),
    "Infinity": (_post(_ASK + b',"top_p":Infinity}'), {400}),
    "1e999": (_post(_ASK + b',"temperature":1e999}'), {400}),
    "an integer of 5000 digits": (_post(_ASK + b',"seed":' + b"9" * 5000 + b"}"), {400}),
    "an integer of 400 digits": (_post(b'{"text":"Tom","max_tokens":' + b"9" * 400 + b"}"), {400}),
    "top_k of 400 digits": (_post(_ASK + b',"top_k":' + b"9" * 400 + b"}"), {200}),
    "a token of 400 digits": (_post(b'{"model":"%s","prompt":[%s]}' % (MODEL.encode(), b"9" * 400), _TEXT), {400}),
    "a negative token": (_post(b'{"model":"%s","prompt":[-1]}' % MODEL.encode(), _TEXT), {400}),
    "malformed JSON": (_post(b'{"text":'), {400}),
    "no body": (_post(b""), {400}),
    "null": (_post(b"null"), {400}),
    "a list": (_post(b"[1]"), {400}),
    "nested 200 000 deep": (_post(b"[" * 200_000), {400}),
    "nested within a field": (_post(_ASK + b',"stop":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), {400}),
    "half a surrogate pair": (_post(b'{"text":"\\ud800"}'), {400}),
    "half a surrogate pair in messages": (_post(b'{"messages":[{"role":"user","content":"\\udfff"}]}'), {400}),
    "half a surrogate pair as prompt": (_post(b'{"model":"%s","prompt":"\\ud800"}' % MODEL.encode(), _TEXT), {400}),
    "half a surrogate pair as model": (_post(b'{"model":"\\ud800","prompt":"x"}', _TEXT), {404}),
    "not UTF-8": (_post(b'{"text":"\xff\xfe"}'), {400}),
    "wrong types": (_post(b'{"text":{"a":1},"max_tokens":"two"}'), {400}),
    "no messages": (_post(b'{"model":"%s","messages":[]}' % MODEL.encode(), _CHAT), {400}),
    "five stops": (_post(_ASK + b',"stop":["a","b","c","d","e"]}'), {400}),
    "a picture": (_post(b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}'), {400}),
    "another model": (_post(b'{"model":"gpt-4","prompt":"x"}', _TEXT), {404}),
    "context overflow": (_post(b'{"text":"%s"}' % (b"word " * 600)), {400}),
    "10 MB": (_post(b'{"text":"%s"}' % (b"x" * 10_000_000)), {413}),
    "10 MB in chunks": (
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 160 + b"0\r\n\r\n",
        {413},
    ),
    "100 TB announced": (
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000000000000\r\n\r\n{}",
        {413},
    ),
    "a bad chunk": (
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
        {400},
    ),
    "negative length": (b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}", {400}),
    "two lengths": (
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        {400},
    ),
    "another content type": (
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        {415},
    ),
    "packed": (_post(b"\x1f\x8b", more=b"Content-Encoding: gzip\r\n"), {400}),
    "foreign Origin": (_post(_ASK + b"}", more=b"Origin: http://evil.example\r\n"), {403}),
    "Origin null": (_post(_ASK + b"}", more=b"Origin: null\r\n"), {403}),
    "foreign Host": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", {403}),
    "two Hosts": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n", {400, 403}),
    "no Host": (b"GET /v1/models HTTP/1.1\r\n\r\n", {400}),
    "HTTP/1.0 without Host": (b"GET /v1/models HTTP/1.0\r\n\r\n", {403}),
    "HTTP/1.0": (_get(b"/v1/models", version=b"1.0"), {200}),
    "HTTP/1.0 chat": (_post(_ASK + b"}", version=b"1.0"), {200}),
    "unknown method": (_get(b"/chat", method=b"BREW"), {405}),
    "wrong method": (_get(b"/chat", method=b"DELETE"), {405}),
    "a path that is not there": (_get(b"/nowhere"), {404}),
    "path traversal": (_get(b"/v1/models/../../../../etc/passwd"), {404}),
    "path traversal, escaped": (_get(b"/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), {404}),
    "path with NUL and no UTF-8": (_get(b"/v1/models/%00%ff%fe"), {404}),
    "a header of 1 MiB": (_get(b"/v1/models", more=b"X: " + b"a" * (1 << 20) + b"\r\n"), {0, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", {400}),
    "WebSocket without key": (_get(b"/ws", more=b"Upgrade: websocket\r\nConnection: Upgrade\r\n"), {400}),
    "half a body": (b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{}", {0, 415}),
    "half a header": (b"POST /chat HTTP/1.1\r\nHost: loc", {0}),
}
UNFINISHED = ("half a body", "half a header")


def send_what_is_wrong(server: Address) -> dict[str, int]:
    """Everything in BAD; the server answers, and goes on. Bodies of errors are OpenAI's error object."""
    found: dict[str, int] = {}
    for name, (sent, expected) in BAD.items():
        status, body = exchange(server, signed(server, sent), ends=name in UNFINISHED)
        assert status in expected, f"{name}: {status} {body[:300]!r}"
        if body.startswith(b"{") and status >= 400:
            ErrorAnswer.model_validate_json(body)
            assert not (status == 400 and b'"message":""' in body)
        if name == "context overflow":
            assert b"context_length_exceeded" in body
        assert status_of(server) == 200, name
        found[name] = status
    return found


def signed(server: Address, sent: bytes) -> bytes:
    """With the server's key."""
    first, end, rest = sent.partition(b"\r\n")
    return first + end + b"".join(f"{name}: {value}\r\n".encode() for name, value in server.headers.items()) + rest


def exchange(server: Address, sent: bytes, *, ends: bool = False) -> tuple[int, bytes]:
    """Status (0: none) and body of what comes back; `ends`: nothing more is sent."""
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # the server need not read all of it
            connection.sendall(sent)
            if ends:
                connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        try:
            response.begin()
            return response.status, response.read()
        except (ConnectionError, http.client.BadStatusLine):
            return 0, b""
        finally:
            response.close()


def status_of(server: Address, path: str = "/health") -> int:
    return exchange(server, b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())[0]


@contextmanager
def slow_clients(server: Address, count: int) -> Iterator[None]:
    """Connections that have sent part of a header, or of a body, and send no more."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(socket.create_connection((server.host, server.port), timeout=30))
            half = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
            connection.sendall(half + b"\r\n{" if number % 2 else half[: 20 + number % 60])
        yield
