"""`smolcluster serve`: a model's folder to a server that answers, in one process or in stages on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from smolcluster.config.schema import ServingConfig
from smolcluster.data.tokenizer import Tokenizer, load_tokenizer
from smolcluster.device import prepare_process, resolve_device
from smolcluster.errors import ConfigError, PeerLost, ServingError, SmolError
from smolcluster.hub import import_extra
from smolcluster.kinds import JsonValue
from smolcluster.models.folder import model_folder, read_json
from smolcluster.models.split import split_by_cost
from smolcluster.run.stage import StageBootstrap
from smolcluster.run.stage_processes import StageProcesses
from smolcluster.serving.chat_template import load_chat_template
from smolcluster.serving.engine import Engine, Event, Observer
from smolcluster.serving.executor import Executor, LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore
from smolcluster.serving.service import Service, Wishes
from smolcluster.serving.stage_hub import StageHub
from smolcluster.transport.base import Listener
from smolcluster.transport.security import new_token, user_folder
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

if TYPE_CHECKING:
    import uvicorn

    from smolcluster.serving.metrics import ServingMetrics
    from smolcluster.serving.sessions import SessionStore

logger = logging.getLogger(__name__)

# For requests under way when the server is told to end.
SHUTDOWN_SECONDS = 5
# For the processes of this machine to import torch, and to come.
START_SECONDS = 120.0
# A context that is shorter is of no use.
LEAST_LENGTH = 64
# How long streams wait for a node to come back where none is left, in patiences.
RETURN_PATIENCES = 12
LOCALHOST = "127.0.0.1"
# Of a model's id in a file's name: letters may take four bytes each, and names have 255.
_NAME_CHARACTERS = 50


@dataclass(frozen=True, slots=True)
class Layout:
    """Over how many processes a model is spread.

    Attributes:
        stages: processes of this machine, this one included.
        split: blocks of each; None: by what they cost.
        patience: seconds until a silent stage counts as lost.
        is_deterministic: an answer does not depend on the others', to the last bit, nor on what dies meanwhile.
        logs: folder for the stages' logs; None: they have none.
    """

    stages: int = 1
    split: tuple[int, ...] | None = None
    patience: float = 5.0
    is_deterministic: bool = False
    logs: Path | None = None


def make_service(
    name: str,
    settings: ServingConfig,
    *,
    dtype: str = "fp32",
    device: str = "cpu",
    layout: Layout | None = None,
    observer: Observer | None = None,
) -> Service:
    """Load a model and begin to serve it; blocks until all of it is there. `close` the service at the end.

    Args:
        name: the model's folder, or Hugging Face id.
        settings: the section `serving`.
        dtype: see layer_store.DTYPES.
        device: where to compute.
        layout: over which processes; None: this one.
        observer: is told how long things take.

    Raises:
        ConfigError: there is no such model, or it is of a kind that cannot be served.
        CheckpointError: its weights are damaged.
    """
    layout = layout or Layout()
    prepare_process()
    folder = model_folder(name, with_weights=True, key="--model")
    resolved = str(resolve_device(device, key="--device"))
    store = LayerStore(folder, dtype, resolved, is_deterministic=layout.is_deterministic)
    dtype = store.dtype
    tokenizer = load_tokenizer(str(folder))
    longest = store.config.max_positions
    size = _cache_size(store, settings, longest)

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(torch.tensor(tokens, dtype=torch.int64))

    with contextlib.ExitStack() as undo:
        recover: Callable[[SmolError], Executor] | None = None
        executor: Executor
        split: Callable[[], JsonValue]
        if layout.stages == 1:
            split = partial(_blocks_of, store, [range(store.layers)])
            if layout.split is not None:
                _plan(store, layout.split, 1)
            executor = LocalExecutor(store.decoder(range(store.layers), size))
        else:
            stages = undo.enter_context(contextlib.closing(LocalStages(folder, store, size, dtype, resolved, layout)))
            executor, recover, split = stages.chain(), stages.recover, stages.blocks
        engine = Engine(
            executor,
            decode,
            recover=recover,
            max_queue=settings.max_queue,
            is_deterministic=layout.is_deterministic,
            timeout=settings.timeout,
            observer=observer,
        )
        undo.callback(engine.close)
        if layout.stages > 1:
            undo.callback(stages.stop)
        service = Service(
            engine,
            tokenizer,
            load_chat_template(folder),
            settings,
            vocab_size=store.config.vocab_size,
            model=model_id(name),
            describe=lambda: {"mode": "mp", "dtype": dtype, "split": split()},
            stop_tokens=_stop_tokens(folder, tokenizer),
            close=undo.pop_all().close,
        )
    return service


class LocalStages:
    """A model over several processes of this machine, of which this one has the engine and the first layers."""

    def __init__(
        self, folder: Path, store: LayerStore, size: CacheSize, dtype: str, device: str, layout: Layout
    ) -> None:
        """Start the other processes; blocks until they are there."""
        self._store, self._layout = store, layout
        self._split = _plan(store, layout.split, layout.stages)
        token, run_id = new_token(), secrets.token_hex(8)
        tcp = TcpOptions(layout.patience, shared_memory=False)
        door = listen(LOCALHOST, 0, token=token, run_id=run_id, rank=0, options=tcp)
        options = {"model": folder.name, "dtype": dtype}

        def listen_here(rank: int, run: str) -> Listener:
            return listen(LOCALHOST, 0, token=token, run_id=run, rank=rank, options=tcp)

        self._hub = StageHub(
            door,
            listen_here,
            TcpNetwork(token, tcp),
            store,
            size,
            self._plan,
            name="stage0",
            patience=layout.patience,
            options=options,
        )
        self._processes = StageProcesses(
            StageBootstrap(
                rank=number,
                name=f"stage{number}",
                host=LOCALHOST,
                controller=door.address,
                token=token.hex(),
                run_id=run_id,
                model=folder.absolute(),
                dtype=dtype,
                device=device,
                is_deterministic=layout.is_deterministic,
                patience=layout.patience,
                options=options,
                log=None if layout.logs is None else layout.logs.absolute() / f"stage{number}.log",
            )
            for number in range(1, layout.stages)
        )
        try:
            self._processes.wait_for(lambda: len(self._hub.nodes()) == layout.stages - 1, START_SECONDS)
        except BaseException:
            self.close()
            raise

    def chain(self) -> Executor:
        """Of all stages."""
        return self._hub.chain(self._layout.stages, timeout=START_SECONDS, needs_all=True)

    def recover(self, error: SmolError) -> Executor:
        """Of those that are left."""
        lost = []
        if isinstance(error, PeerLost) and 0 < error.rank < len(self._hub.stages):
            lost = [self._hub.stages[error.rank][0]]
        return self._hub.chain(self._layout.stages, without=lost, timeout=RETURN_PATIENCES * self._layout.patience)

    def _plan(self, stages: int) -> Sequence[range]:
        return self._split if stages == self._layout.stages else _plan(self._store, None, stages)

    def blocks(self) -> JsonValue:
        """How many each stage has, in order."""
        return _blocks_of(self._store, [layers for _, layers in self._hub.stages])

    def stop(self) -> None:
        """Put no stages together any more."""
        self._hub.stop()

    def close(self) -> None:
        """Let the stages go, and end their processes; blocks."""
        self._hub.close()
        self._processes.close()


def _plan(store: LayerStore, blocks: Sequence[int] | None, stages: int) -> list[range]:
    """The layers of each stage."""
    layers, costs = store.layers, store.costs()
    if blocks is None:
        times = [cost.time for cost in costs]
        return split_by_cost([times] * stages, [cost.parameters for cost in costs])
    if len(blocks) != stages or sum(blocks) != layers - 2 or min(blocks) < 0:
        raise ConfigError(
            f"--split {','.join(map(str, blocks))}: the model has {layers - 2} blocks, so give {stages} numbers that "
            "add up to that"
        )
    edges = [0] + [1 + sum(blocks[:number]) for number in range(1, stages)] + [layers]
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]


def _blocks_of(store: LayerStore, stages: Sequence[range]) -> JsonValue:
    """How many blocks each stage has."""
    return [len(range(max(layers.start, 1), min(layers.stop, store.layers - 1))) for layers in stages]


def _cache_size(store: LayerStore, settings: ServingConfig, longest: int) -> CacheSize:
    """Keys and values of all slots are to take half of the free memory at most, all stages together.

    Raises:
        ConfigError: a context of `serving.ctx_length` tokens takes more.
    """
    slots = settings.max_concurrent
    room = psutil.virtual_memory().available // 2 // (slots * store.bytes_per_position())
    length = min(settings.ctx_length or longest, longest)
    if length <= room:
        return CacheSize(slots, length)
    if settings.ctx_length is not None or room < LEAST_LENGTH:
        raise ConfigError(
            f"{slots} contexts of {length} tokens do not fit into half of the free memory; {room} tokens each would. "
            "Set serving.ctx_length or serving.max_concurrent lower"
        )
    logger.warning("the context is cut from %d to %d tokens, so that %d fit into memory", length, room, slots)
    return CacheSize(slots, room)


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


def model_id(name: str) -> str:
    """What a model is called in the API: the last part of its folder, or its Hugging Face id."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


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


def run_server(server: uvicorn.Server, listener: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM; then until what is under way has ended, SHUTDOWN_SECONDS at most. Blocks."""
    # uvicorn handles these while it serves, and raises them once more when it has ended: then they are done with.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass)
    server.run(sockets=[listener])


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
