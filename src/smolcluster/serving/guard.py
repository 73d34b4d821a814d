"""Who may ask: the key, host names, origins, and what a body may be. Before anything else sees a request."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolcluster.serving.openai import error_body

MAX_BODY_BYTES = 4 << 20
_OPEN_PATHS = ("/health",)
# Of a body that is refused: whoever is still sending it when the connection ends may not get to read why.
_DISCARDED_BYTES = 16 << 20
_DISCARD_SECONDS = 5.0


class Guard:
    """What is checked; `middleware` wraps an application."""

    def __init__(self, hosts: Iterable[str], key: str | None = None, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        """Args:
        hosts: names by which the server may be called, without ports. A browser that was tricked into calling it
            under another name (DNS rebinding) is refused.
        key: what clients must send as a bearer token; None: nothing.
        max_body_bytes: of a request.
        """
        self._hosts = {host.lower() for host in hosts}
        self._key = None if key is None else key.encode()
        self._owner = "" if self._key is None else hashlib.sha256(self._key).hexdigest()
        self._max_body_bytes = max_body_bytes

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application behind the guard; `state.owner` of a request says by whose key it came, "" if by none."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket"):
                await app(scope, receive, send)
            elif (refusal := self._refusal(scope)) is not None:
                await _refuse(scope, receive, send, *refusal)
            else:
                await self._pass_on(app, scope, receive, send)

        return guarded

    async def _pass_on(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; a body of unknown length that turns out too long is refused."""
        scope.setdefault("state", {})["owner"] = self._owner
        received, has_begun, is_too_long, has_more = 0, False, False, True

        async def counted() -> Message:
            nonlocal received, is_too_long, has_more
            message = await receive()
            received += len(message.get("body", b""))
            has_more = message.get("more_body", False)
            if received > self._max_body_bytes and not has_begun:
                is_too_long = True
                raise _TooLong
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if not is_too_long:  # else the application says that it could not read the body
                await send(message)

        with contextlib.suppress(_TooLong):
            await app(scope, counted, noted)
        if is_too_long:
            if has_more:
                await _discard(receive)
            await _answer(send, 413, self._too_long(), None)

    def _too_long(self) -> str:
        return f"the body has more than {self._max_body_bytes} bytes"

    def _is_known(self, host: str) -> bool:
        """A name of ours, or an address: only names can be made to lead elsewhere (DNS rebinding)."""
        if host in self._hosts:
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(host))
        return False

    def _refusal(self, scope: Scope) -> tuple[int, str, str | None] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = _name(headers.get("host", ""))
        if not self._is_known(host):
            return 403, f"this server is not called {host!r}. Name it with --host, or call it by its address", None
        method = scope.get("method", "WEBSOCKET")
        origin = headers.get("origin")
        if (
            origin is not None
            and method not in ("GET", "HEAD", "OPTIONS")
            and _origin(origin) not in (*self._hosts, host)
        ):
            return 403, f"pages of {origin} may not ask this server", None
        if self._key is not None and scope["path"] not in _OPEN_PATHS:
            given = headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode("latin-1"), self._key):
                return 401, "the API key is missing or wrong. Send it as Authorization: Bearer KEY", "invalid_api_key"
        if method == "POST":
            if (headers.get("content-length") or "0").isdigit() and int(
                headers.get("content-length") or 0
            ) > self._max_body_bytes:
                return 413, self._too_long(), None
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and (
                headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
            ):
                return 415, "the body must be application/json", None
        return None


class _TooLong(Exception):
    """More of a body has come than may."""


def _origin(origin: str) -> str:
    """The host of an Origin header; "" of one that has none."""
    try:
        return _name(urlsplit(origin).netloc)
    except ValueError:
        return ""


def _name(netloc: str) -> str:
    """The host of host:port, [v6]:port."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str, code: str | None) -> None:
    """Before anything of the body has been asked for."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
        return
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    # Who expects to be told before sending it is told now; and so is who would send more than can be waited for.
    if b"expect" not in headers and length.isdigit() and int(length) <= _DISCARDED_BYTES:
        await _discard(receive)
    await _answer(send, status, message, code)


async def _answer(send: Send, status: int, message: str, code: str | None) -> None:
    body = json.dumps(error_body(message, "invalid_request_error", code=code)).encode()
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def _discard(receive: Receive) -> None:
    left = _DISCARDED_BYTES
    with anyio.move_on_after(_DISCARD_SECONDS):
        while left > 0:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return
            left -= len(message.get("body", b""))
