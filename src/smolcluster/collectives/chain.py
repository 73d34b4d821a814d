"""Sums along a chain of ranks, of which each speaks to its neighbours only.

Ranks that hold consecutive layers of a model send activations to the next rank and gradients to the one before. What
they have to agree on in a step goes the same ways, so that no other link carries anything then.

    ChainSum   rank 0 -> 1 -> 2 adds up, 2 -> 1 -> 0 brings the total back: 2 (P-1) messages, the same bits everywhere
    EndsSum    rank 0 and rank P-1 give each other a tensor, through the ranks between: what both then hold is its sum

Nothing here has a thread. `poll` does what can be done without waiting; call it now and then, so that ranks that wait
for this one can go on, and `wait` for the end.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from smolcluster.collectives.base import Communicator, Work


class Pollable(Protocol):
    """An agreement under way."""

    def poll(self) -> bool:
        """Pass on what has arrived; whether all is done. Never blocks.

        Raises:
            PeerLost: a neighbour is gone.
        """
        ...

    def wait(self) -> None:
        """Block until all is done.

        Raises:
            PeerLost: a neighbour is gone.
        """
        ...


class ChainSum:
    """The sum of a tensor over all ranks, in place."""

    def __init__(self, comm: Communicator, tensor: Tensor, tag: int) -> None:
        """Begin.

        Args:
            comm: the ranks, in the order of the chain. Every rank makes one.
            tensor: any shape, contiguous, alike on all ranks; it is this object's until all is done.
            tag: of the two messages to and from a neighbour; not used for anything else meanwhile.
        """
        self._comm = comm
        self._tensor = tensor
        self._tag = tag
        self._is_first = comm.rank == 0
        self._is_last = comm.rank == comm.world_size - 1
        self._sent: list[Work] = []
        self._below = None if self._is_first else comm.recv(comm.rank - 1, tag)
        self._above: Work | None = None
        if self._is_first:
            self._pass_up()

    def poll(self) -> bool:
        """See Pollable."""
        if self._below is not None and self._below.done():
            self._add()
        if self._above is not None and self._above.done():
            self._take()
        return self._below is None and self._above is None and all(work.done() for work in self._sent)

    def wait(self) -> None:
        """See Pollable."""
        if self._below is not None:
            self._add()
        if self._above is not None:
            self._take()
        for work in self._sent:
            work.wait()

    def _add(self) -> None:
        assert self._below is not None
        self._tensor += self._below.result()[0]
        self._below = None
        self._pass_up()

    def _pass_up(self) -> None:
        if self._is_last:
            self._pass_down()
            return
        # A copy leaves: the total comes back into the tensor itself.
        self._sent.append(self._comm.send(self._tensor.clone(), self._comm.rank + 1, self._tag))
        self._above = self._comm.recv(self._comm.rank + 1, self._tag, self._tensor)

    def _take(self) -> None:
        assert self._above is not None
        self._above.wait()  # raises what went wrong
        self._above = None
        self._pass_down()

    def _pass_down(self) -> None:
        if not self._is_first:
            self._sent.append(self._comm.send(self._tensor, self._comm.rank - 1, self._tag))


class EndsSum:
    """The sum of two tensors, one of the first rank and one of the last, on both."""

    def __init__(self, comm: Communicator, tensor: Tensor | None, tag: int) -> None:
        """Begin.

        Args:
            comm: the ranks, in the order of the chain; at least two. Every rank makes one.
            tensor: contiguous, alike on both; it is summed in place. None on the ranks between, which pass it on.
            tag: as for ChainSum.
        """
        self._comm = comm
        self._tensor = tensor
        self._tag = tag
        self._sent: list[Work] = []
        rank, last = comm.rank, comm.world_size - 1
        self._below = None if rank == 0 else comm.recv(rank - 1, tag)
        self._above = None if rank == last else comm.recv(rank + 1, tag)
        self._arrived: Tensor | None = None
        if rank in (0, last):
            assert tensor is not None
            self._sent.append(comm.send(tensor, 1 if rank == 0 else last - 1, tag))

    def poll(self) -> bool:
        """See Pollable."""
        self._go_on(waits=False)
        return self._below is None and self._above is None and all(work.done() for work in self._sent)

    def wait(self) -> None:
        """See Pollable."""
        self._go_on(waits=True)
        for work in self._sent:
            work.wait()
        if self._tensor is not None and self._arrived is not None:
            self._tensor += self._arrived.to(self._tensor.device)  # now that nothing of it is being sent
            self._arrived = None

    def _go_on(self, *, waits: bool) -> None:
        rank, last = self._comm.rank, self._comm.world_size - 1
        if self._below is not None and (waits or self._below.done()):
            [self._arrived], self._below = self._below.result(), None
            if rank != last:
                self._sent.append(self._comm.send(self._arrived, rank + 1, self._tag))
        if self._above is not None and (waits or self._above.done()):
            [self._arrived], self._above = self._above.result(), None
            if rank != 0:
                self._sent.append(self._comm.send(self._arrived, rank - 1, self._tag))
