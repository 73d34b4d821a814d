"""The process of one stage of a served model: `python -m smolcluster.run.stage`, started by `serve --local N`.

Its bootstrap comes as a line on standard input (see parent.py); at end-of-file the parent is gone, and so is it.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from pathlib import Path

from pydantic import BaseModel

from smolcluster.cluster.sessions import Newcomer, join_session
from smolcluster.device import prepare_process
from smolcluster.errors import SmolError
from smolcluster.log import log_to_file
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
        dtype, device, is_deterministic: of its layers.
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
    dtype: str
    device: str
    is_deterministic: bool
    patience: float
    options: dict[str, str]
    log: Path | None = None


def run_node(bootstrap: StageBootstrap) -> None:
    """Serve as a stage for as long as the controller is there. Blocks.

    Raises:
        ConfigError: the model cannot be served here, or the controller refused this node.
        RendezvousTimeout: there is no controller.
    """
    prepare_process()
    token = bytes.fromhex(bootstrap.token)
    store = LayerStore(bootstrap.model, bootstrap.dtype, bootstrap.device, is_deterministic=bootstrap.is_deterministic)
    options = TcpOptions(bootstrap.patience, shared_memory=False)
    network = TcpNetwork(token, options)
    newcomer = Newcomer(bootstrap.rank, bootstrap.name, secrets.token_hex(8), f"tcp://{bootstrap.host}:0")

    def listen_here(rank: int, run_id: str) -> Listener:
        return listen(bootstrap.host, 0, token=token, run_id=run_id, rank=rank, options=options)

    while True:
        session = join_session(
            newcomer,
            network,
            lambda: bootstrap.controller,
            run_id=bootstrap.run_id,
            patience=bootstrap.patience,
            timeout=JOIN_PATIENCES * bootstrap.patience,
            options=bootstrap.options,
        )
        try:
            error = StageNode(session, listen_here, network, store, bootstrap.patience).run()
        finally:
            session.close()
        logger.warning("session over, joining again reason=%s", error)


def main() -> None:
    """One stage's process."""
    parent = ParentLink()
    bootstrap = StageBootstrap.model_validate(parent.bootstrap())
    if bootstrap.log is not None:
        log_to_file(bootstrap.log)
    try:
        run_node(bootstrap)
    except SmolError as error:
        sys.stderr.write(f"error: {bootstrap.name}: {error}\n")
        sys.stderr.flush()
        logging.shutdown()
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
