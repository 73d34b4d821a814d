"""`smolcluster serve`: a model's folder to a server that answers, in one process or in stages on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolcluster.config.schema import ServingConfig
from smolcluster.data.tokenizer import Tokenizer, load_tokenizer
from smolcluster.device import prepare_process, resolve_device, spare_collector
from smolcluster.errors import ConfigError, ServingError
from smolcluster.hub import import_extra
from smolcluster.models.folder import read_json
from smolcluster.run.served_model import hub_folder, model_id
from smolcluster.run.stages import Layout, Stages
from smolcluster.serving.chat_template import load_chat_template
from smolcluster.serving.engine import Engine
from smolcluster.serving.layer_store import LayerStore
from smolcluster.serving.replica import Observer
from smolcluster.serving.requests import Event
from smolcluster.serving.service import Service, Wishes
from smolcluster.transport.security import user_folder

if TYPE_CHECKING:
    import uvicorn

    from smolcluster.serving.metrics import ServingMetrics
    from smolcluster.serving.sessions import SessionStore

logger = logging.getLogger(__name__)

# For requests under way when the server is told to end.
SHUTDOWN_SECONDS = 5
# Of a model's id in a file's name: letters may take four bytes each, and names have 255.
_NAME_CHARACTERS = 50


def make_service(
    name: str,
    settings: ServingConfig,
    *,
    dtype: str = "fp32",
    device: str = "cpu",
    layout: Layout | None = None,
    observer: Observer | None = None,
    model: str | None = None,
) -> Service:
    """Load a model and begin to serve it; blocks until all of it is there. `close` the service at the end.

    Args:
        name: the model's folder, or Hugging Face id.
        settings: the section `serving`.
        dtype: see layer_store.DTYPES.
        device: where to compute.
        layout: over which processes; None: this one.
        observer: is told how long things take.
        model: what it is called in the API; None: see model_id.

    Raises:
        ConfigError: there is no such model, or it is of a kind that cannot be served.
        CheckpointError: its weights are damaged.
    """
    layout = layout or Layout()
    prepare_process()
    folder = hub_folder(name, key="--model")
    resolved = str(resolve_device(device, key="--device"))
    store = LayerStore(folder, dtype, resolved, is_deterministic=layout.is_deterministic)
    tokenizer = load_tokenizer(str(folder))

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(torch.tensor(tokens, dtype=torch.int64))

    with contextlib.ExitStack() as undo:
        stages = undo.enter_context(contextlib.closing(Stages(folder, store, settings, resolved, layout)))
        engine = Engine(
            stages.executors,
            decode,
            max_queue=settings.max_queue,
            is_deterministic=layout.is_deterministic,
            timeout=settings.timeout,
            observer=observer,
        )
        undo.callback(engine.close)
        undo.callback(stages.stop)
        service = Service(
            engine,
            tokenizer,
            load_chat_template(folder),
            settings,
            vocab_size=store.config.vocab_size,
            model=model or model_id(name),
            describe=lambda: {"dtype": store.dtype, **stages.describe()},
            stop_tokens=_stop_tokens(folder, tokenizer),
            close=undo.pop_all().close,
        )
    return service


def _stop_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an answer: as the folder's generation_config.json says, else its config.json, else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if known := frozenset(token for token in ids if isinstance(token, int)):
                return known
    return frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})


def listen_http(host: str, port: int) -> socket.socket:
    """Where the server listens.

    Raises:
        ConfigError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen at {host}:{port} ({exc.strerror or exc}). Choose another --port") from exc
    return listener


def load_server_extra() -> None:
    """Look for what the HTTP interface needs, before a model is loaded for it.

    Raises:
        ConfigError: the extra is not installed.
    """
    for module in ("fastapi", "uvicorn", "websockets", "prometheus_client"):
        import_extra(module, "smolcluster serve", "serve")


def sessions_file(settings: ServingConfig, model: str) -> Path:
    """Where the conversations with a model are kept."""
    if settings.sessions_file is not None:
        return Path(settings.sessions_file).expanduser()
    name = re.sub(r"[^\w.-]", "_", model)[:_NAME_CHARACTERS]
    if name != model:  # another model's name may be the same now
        name += "-" + hashlib.sha256(model.encode(errors="replace")).hexdigest()[:8]
    return user_folder() / "sessions" / f"{name}.sqlite"


def make_server(
    service: Service, host: str, *, key: str | None, metrics: ServingMetrics, store: SessionStore | None = None
) -> uvicorn.Server:
    """What answers HTTP requests; its `run` blocks until it is told to exit.

    Args:
        service: what it answers with.
        host: the name or address that it listens at.
        key: what clients have to send; None: nothing.
        metrics: what `GET /metrics` tells; it watches the service's engine from now on.
        store: keeps the sessions; closed when `run` ends. None: they are kept in memory.
    """
    server = import_extra("uvicorn", "smolcluster serve", "serve")
    from smolcluster.serving.app import make_app
    from smolcluster.serving.conversations import Conversations
    from smolcluster.serving.guard import MAX_BODY_BYTES, Guard

    hosts = {"localhost", "127.0.0.1", "::1", host, socket.gethostname()}
    conversations = None if store is None else Conversations(service, store)
    app = make_app(service, Guard(hosts, key), metrics, conversations)
    metrics.watch(service.engine)
    config = server.Config(
        app,
        log_level="warning",
        ws="websockets-sansio",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ws_max_size=MAX_BODY_BYTES,
    )
    made: uvicorn.Server = server.Server(config)
    return made


def run_server(server: uvicorn.Server, listeners: list[socket.socket]) -> None:
    """Answer until SIGINT or SIGTERM; then until what is under way has ended, SHUTDOWN_SECONDS at most. Blocks."""
    # uvicorn handles these while it serves, and raises them once more when it has ended: then they are done with.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass)
    spare_collector()
    server.run(sockets=listeners)


def _pass(number: int, frame: object) -> None:
    """A signal that has been handled."""


def write_on(service: Service, prompt: str, wishes: Wishes, say: Callable[[str], None]) -> str:
    """Let the model continue a text; blocks, and closes the engine.

    Args:
        service: the model.
        prompt: at least one token.
        wishes: what is asked.
        say: called with each piece.

    Returns:
        How many tokens in what time.

    Raises:
        ServingError: the prompt is empty, or too long.
    """
    ended, count, first = threading.Event(), 0, 0.0
    failure: str | None = None

    def take(event: Event) -> None:
        nonlocal count, first, failure
        if event.token is not None:
            count += 1
            first = first or time.perf_counter()
        say(event.text)
        if event.finish_reason is not None:
            failure = event.error
            ended.set()

    began = time.perf_counter()
    try:
        service.engine.submit(service.request(service.encode(prompt), wishes), take)
        while not ended.wait(0.2):  # so that Ctrl-C is seen
            pass
    finally:
        service.close()
    if failure is not None:
        raise ServingError(failure)
    seconds = time.perf_counter() - first
    rate = f", {(count - 1) / seconds:.1f} tokens per second" if count > 1 and seconds > 0 else ""
    return f"{count} tokens, the first after {1000 * (first - began):.0f} ms{rate}"
