"""A generation whose members have been told of each other by somebody who knows them all; they only have to meet."""

from __future__ import annotations

from collections.abc import Callable

from smolcluster.cluster.heartbeat import Heartbeat
from smolcluster.cluster.world import View, World
from smolcluster.transport.base import Listener, Network


class GenerationWorld(World):
    """A world together with its heartbeat."""

    def __init__(self, rank: int, view: View, listener: Listener, network: Network, patience: float) -> None:
        super().__init__(rank, view, {}, listener, network, patience)
        self._heartbeat = Heartbeat(self)

    def close(self) -> None:
        """Close all links and the listener, then end the threads."""
        super().close()
        self._heartbeat.close()


def meet(
    rank: int,
    view: View,
    listener: Listener,
    network: Network,
    *,
    patience: float,
    timeout: float,
    begun: Callable[[World], None] = lambda world: None,
) -> GenerationWorld:
    """Open a link to every other member; blocks until all are there.

    Args:
        rank: this process's, in the view.
        view: the members; all have the same, and no other generation has its run_id.
        listener: where this member accepts connections, at the address that the view says; the world closes it.
        network: how to dial.
        patience: seconds until a silent member counts as lost.
        timeout: seconds to wait for all.
        begun: is given the world before the others are waited for, so that it can be aborted meanwhile.

    Raises:
        ConnectFailed: not all came in time.
        PeerLost: one was lost meanwhile.
    """
    world = GenerationWorld(rank, view, listener, network, patience)
    begun(world)
    try:
        world.link_all(timeout)
    except BaseException:
        world.close()
        raise
    return world
