"""Which nodes a chain is made of."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest

from smolcluster.cluster.sessions import Newcomer
from smolcluster.cluster.world import World
from smolcluster.errors import PeerLost, ServingError
from smolcluster.serving.layer_store import CacheSize, LayerStore, Machine
from smolcluster.serving.stage_group import StageGroup
from smolcluster.serving.stage_hub import Node, StageHub


class FakeHub:
    """Has the nodes that it is told of."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.patience = 0.03
        self.here: list[Node] = []

    def nodes(self) -> list[Node]:
        return sorted(self.here, key=lambda node: node.newcomer.rank)

    def check_open(self) -> None:
        pass


def make_group(hub: FakeHub, stages: int, *, has_layers: bool) -> StageGroup:
    nothing = cast("Any", None)
    return StageGroup(
        cast("StageHub", hub), nothing, nothing, cast("LayerStore", None), CacheSize(1, 1), nothing, stages=stages,
        own=Machine() if has_layers else None, timeout=1.0,
    )  # fmt: skip


def node(rank: int, name: str) -> Node:
    return Node(Newcomer(rank, name, f"{name} {time.monotonic()}", ""), cast("World", None), machine=Machine())


def names(nodes: list[Node]) -> list[str]:
    return [each.name for each in nodes]


def choose(group: StageGroup, without: list[Node]) -> list[Node]:
    group._nodes = group._chosen(without, time.monotonic() + 0.3)
    return group._nodes


def test_a_spare_takes_the_place_of_the_one_that_is_lost() -> None:
    hub = FakeHub()
    hub.here = [node(1, "a"), node(2, "b"), node(3, "c")]
    group = make_group(hub, 3, has_layers=True)
    first = choose(group, [])
    assert names(first) == ["a", "b"]
    assert names(choose(group, [first[0]])) == ["c", "b"]


def test_who_comes_again_is_used_and_who_only_seems_to_be_there_is_not() -> None:
    hub = FakeHub()
    lost = node(1, "a")
    hub.here = [lost]
    group = make_group(hub, 1, has_layers=False)
    choose(group, [])
    with pytest.raises(ServingError, match="no node"):
        choose(group, [lost])
    hub.here = [node(1, "a")]
    assert names(choose(group, [lost])) == ["a"]


def test_replicas_do_not_take_each_others_nodes() -> None:
    hub = FakeHub()
    hub.here = [node(1, "a"), node(2, "b")]
    first, second = make_group(hub, 1, has_layers=False), make_group(hub, 1, has_layers=False)
    assert names(choose(first, []) + choose(second, [])) == ["a", "b"]
    with pytest.raises(ServingError):
        choose(second, hub.here[1:])


def test_who_is_there_and_takes_no_layers_is_lost_each_time() -> None:
    """Its session lives, but what computes does not; who reads for an earlier chain is waited for."""
    hub = FakeHub()
    good, hung = node(1, "a"), node(2, "b")
    group = make_group(hub, 3, has_layers=True)
    for generation in (1, 2):
        for each in (good, hung):
            each.assign(generation)
        good.accepted = good.loaded = generation
        with pytest.raises(PeerLost, match="b does not take layers") as caught:
            group._wait_loaded([good, hung], generation)
        assert caught.value.rank == 2
    hung.accepted = 2  # it has begun to read at last
    hung.assign(3)
    assert hung.is_reading
    hung.loaded = 3
    group._wait_loaded([hung], 3)
