"""`smolcluster chat`: a conversation with a served model, in the terminal."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from smolcluster.errors import ConfigError, ServingError

_HELP = "Write and press Enter. Ctrl-C stops an answer, /new begins another conversation, /quit or Ctrl-D ends."
_CONNECT_SECONDS = 10.0


def chat(
    url: Annotated[str, typer.Option(metavar="URL", help="Where the model is served.")] = "http://localhost:8080",
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with the server's key.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.", min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.", min=0, max=2**63 - 1)] = None,
) -> None:
    """Talk to a model that `smolcluster serve` serves."""
    from smolcluster.cli.serve import read_key

    key = None if api_key_file is None else read_key(api_key_file)
    server = _Server(url, key)
    wishes = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    wishes = {name: value for name, value in wishes.items() if value is not None}
    print(f"{server.model()} at {url}. {_HELP}")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history in input()
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/new":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = _show(server.answer({"messages": messages, **wishes}))
            except ServingError as error:  # too long, too many at once: the conversation is still there
                print(f"[{error}]", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _show(events: Iterator[dict[str, Any]]) -> str:
    """Print an answer as it comes; what of it came."""
    text, note = "", ""
    try:
        for event in events:
            if "error" in event:
                note = f"error: {event['error']}"
            elif event["done"]:
                note = (
                    f"{event['num_tokens']} tokens, the first after {event['time_to_first_token_ms']:.0f} ms, "
                    f"{event['tokens_per_second']:.1f} tokens per second"
                )
            else:
                text += event["token"]
                print(event["token"], end="", flush=True)
    except KeyboardInterrupt:
        note = "stopped"
    print(f"\n[{note}]", file=sys.stderr)
    return text


class _Server:
    """Asks it, over a new connection each time."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url}: give an address such as http://localhost:8080")
        self._url = url
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._netloc = parts.netloc
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def model(self) -> str:
        """What is served there."""
        with self._ask("GET", "/config", None) as response:
            return str(json.loads(response.read())["model"])

    def answer(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of `POST /chat`; leaving early cancels the request."""
        with self._ask("POST", "/chat", body) as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self._netloc, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(None)  # a long prompt may take its time
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ServingError(f"{self._url} answers {response.status}: {_reason(response.read())}")
            yield response
        except (OSError, http.client.HTTPException) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise ServingError(
                f"{self._url} does not answer ({reason}). Start smolcluster serve, or name it with --url"
            ) from exc
        finally:
            connection.close()


def _reason(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
