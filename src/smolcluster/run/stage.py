"""A process that computes layers of a served model: one that `serve --local N` starts, or a machine of a cluster file.

The first kind is `python -m smolcluster.run.stage`: its bootstrap comes as a line on standard input (see parent.py); at
end-of-file the parent is gone, and so is it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel

from smolcluster.cluster.sessions import Newcomer, join_session
from smolcluster.device import prepare_process, resolve_device, spare_collector
from smolcluster.errors import SmolError
from smolcluster.log import log_to_file
from smolcluster.models.folder import CONFIG, model_folder
from smolcluster.run.parent import ParentLink
from smolcluster.serving.layer_store import LayerStore
from smolcluster.serving.node import StageNode
from smolcluster.transport.base import Listener
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

logger = logging.getLogger(__name__)

# How long a node tries to reach the controller: it may be started first.
JOIN_PATIENCES = 60


class StageBootstrap(BaseModel):
    """What a stage's process is told.

    Attributes:
        rank: of the node, from 1.
        name: of the node.
        host: where it listens.
        controller: the address that it joins.
        token: the cluster token, in hexadecimal.
        run_id: what the nodes have in common before they talk.
        model: the model's folder.
        device: where it computes.
        patience: seconds until a silent node counts as lost.
        options: what must be equal on all nodes.
        log: where it logs; None: nowhere.
    """

    rank: int
    name: str
    host: str
    controller: str
    token: str
    run_id: str
    model: Path
    device: str
    patience: float
    options: dict[str, str]
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class StagePlace:
    """Where a node is, and where its controller is.

    Attributes:
        rank, name: of the node; ranks begin with 1.
        host, port: where it listens for other stages; port 0: any.
        controller: the address that it joins.
        token: of the cluster.
        run_id: what the nodes have in common before they talk.
        tcp: how this machine's sockets are set up.
    """

    rank: int
    name: str
    host: str
    port: int
    controller: str
    token: bytes
    run_id: str
    tcp: TcpOptions


def node_options(folder: Path) -> dict[str, str]:
    """What must be equal where a model is served together: what kind of model it is, wherever its folder lies."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()[:12]
    return {"the model's config.json": digest}


def run_stages_of(place: StagePlace, folder: Path, device: str, options: Mapping[str, str]) -> NoReturn:
    """Compute layers for as long as the controller is there. Blocks.

    Args:
        place: where this node is.
        folder: the model's.
        device: where to compute.
        options: what must be equal on all nodes.

    Raises:
        ConfigError: the controller refused this node.
        RendezvousTimeout: there is no controller.
    """
    network, patience = TcpNetwork(place.token, place.tcp), place.tcp.patience
    newcomer = Newcomer(place.rank, place.name, secrets.token_hex(8), f"tcp://{place.host}:{place.port}")

    def listen_here(rank: int, run_id: str) -> Listener:
        return listen(place.host, place.port, token=place.token, run_id=run_id, rank=rank, options=place.tcp)

    @functools.lru_cache(maxsize=1)  # what has been read is kept
    def open_store(dtype: str, is_deterministic: bool) -> LayerStore:
        return LayerStore(folder, dtype, device, is_deterministic=is_deterministic)

    spare_collector()
    while True:
        session = join_session(
            newcomer,
            network,
            lambda: place.controller,
            run_id=place.run_id,
            patience=patience,
            timeout=JOIN_PATIENCES * patience,
            options=options,
        )
        try:
            error = StageNode(session, listen_here, network, open_store, device, patience).run()
        finally:
            session.close()
        if error is None:
            logger.info("the controller has ended, waiting for it")
        else:
            logger.warning("session over, joining again reason=%s", error)


def serve_layers(place: StagePlace, name: str, device: str) -> NoReturn:
    """Be a node of a cluster file until SIGINT or SIGTERM; see run_stages_of.

    Args:
        place: where this node is.
        name: the model's folder here, or its Hugging Face id.
        device: where to compute.
    """

    def end(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    prepare_process()
    folder = model_folder(name, with_weights=True, key="--model")
    resolved = str(resolve_device(device, key="--device"))
    run_stages_of(place, folder, resolved, node_options(folder))


def main() -> None:
    """One stage's process."""
    parent = ParentLink()
    bootstrap = StageBootstrap.model_validate(parent.bootstrap())
    if bootstrap.log is not None:
        log_to_file(bootstrap.log)
    try:
        prepare_process()
        place = StagePlace(
            bootstrap.rank,
            bootstrap.name,
            bootstrap.host,
            0,
            bootstrap.controller,
            bytes.fromhex(bootstrap.token),
            bootstrap.run_id,
            TcpOptions(bootstrap.patience, shared_memory=False),
        )
        run_stages_of(place, bootstrap.model, bootstrap.device, bootstrap.options)
    except SmolError as error:
        sys.stderr.write(f"error: {bootstrap.name}: {error}\n")
        sys.stderr.flush()
        logging.shutdown()
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
