"""What a node does when its controller says what it cannot read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from smolcluster.cluster.world import World
from smolcluster.errors import FrameError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.serving.layer_store import LayerStore
from smolcluster.serving.node import StageNode

ASSIGN: JsonObject = {
    "generation": 1, "run_id": "r", "rank": 1, "layers": [0, 1], "slots": 1, "length": 8, "dtype": "fp32",
    "is_deterministic": False,
}  # fmt: skip


class FakeSession:
    """Says what it is told to as soon as the node listens for it."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[int, JsonObject], None]] = {}
        self.sent: list[str] = []

    def on(self, kind: str, handler: Callable[[int, JsonObject], None]) -> None:
        self.handlers[kind] = handler

    def on_failure(self, _: Callable[[SmolError], None]) -> None:
        pass

    def send(self, _: int, kind: str, __: JsonObject) -> None:
        self.sent.append(kind)


class FakeListener:
    address = "tcp://127.0.0.1:1"
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeStore:
    def decoder(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("what", ["assign", "meet"])
def test_what_cannot_be_read_ends_the_session_and_the_node_can_listen_again(what: str) -> None:
    session, listener = FakeSession(), FakeListener()
    node = StageNode(
        cast("World", session), lambda *_: cast("Any", listener), cast("Any", None),
        lambda *_: cast("LayerStore", FakeStore()), "cpu", 1.0,
    )  # fmt: skip
    session.handlers["assign"](0, ASSIGN)
    if what == "meet":
        session.handlers["meet"](0, {"generation": 1, "members": "nobody"})
    else:
        session.handlers["assign"](0, {"generation": 2})
    assert isinstance(node.run(), FrameError)
    assert listener.is_closed == (what == "meet")
    assert ("loaded" in session.sent) == (what == "meet")
