"""All-reduce of two ranks that share memory.

Both send all that they have, and each adds the other's numbers to its own: block by block, straight from the memory of
the other's ring. A block is added right after it was sent, while the processor's cache still has it; so each number
comes from main memory once and goes back once. A ring would move as many bytes in two rounds.

Source: the recursive doubling of Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
operations in MPICH", section 4, whose one round for two ranks this is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.wire import finish_average
from smolcluster.transport.shm import SharedMemoryChannel

# 256 KiB: Python's part shows; 1 MiB: two of them and their copies are too much for the cache.
BLOCK_BYTES = 512 << 10
# Blocks that go both ways before the loop looks after other lanes.
BLOCKS_PER_TURN = 16
# Looks for the peer's next block, of 1 to 2 us, before something else is done: it comes in step with ours.
SPINS = 30


class Swap:
    """An all-reduce of two ranks on the channel between them. Both combine in rank order, so both hold the same bits.

    Cost: a + S * b.
    """

    def __init__(self, channel: SharedMemoryChannel, tensor: Tensor, op: ReduceOp, *, is_first: bool) -> None:
        """Send nothing yet.

        Args:
            channel: to the other rank.
            tensor: (n,), on CPU; reduced in place.
            op: SUM, AVG or MAX.
            is_first: this is the lower rank of the two.
        """
        self.sent_bytes = 0
        self.recv_bytes = 0
        self._channel = channel
        self._nbytes = tensor.nbytes
        self._blocks = torch.split(tensor, BLOCK_BYTES // tensor.element_size()) if self._nbytes else ()
        self._sent = 0  # blocks
        self._received = 0
        self._op = op
        self._is_first = is_first
        self._dtype = tensor.dtype

    def __len__(self) -> int:
        return self._nbytes

    def send(self) -> bool:
        """Send the next block, unless one is out that has no counterpart yet; True if it was."""
        return self._sent == self._received and self._send_block()

    def run(self) -> None:
        """Blocks both ways, until nothing moves or the other lanes get their turn."""
        for _ in range(BLOCKS_PER_TURN):
            self.send()
            # A peer that is late will find more than one block: better than to wait for it with each of them.
            if not self._receive_soon() and not self._send_block():
                return

    def _send_block(self) -> bool:
        if self._sent == len(self._blocks):
            return False
        block = self._blocks[self._sent]
        nbytes = block.nbytes
        view = self._channel.try_send_view(nbytes, align=BLOCK_BYTES)
        if view is None:
            return False
        torch.frombuffer(view, dtype=self._dtype).copy_(block)
        self._channel.commit(nbytes)
        self._sent += 1
        self.sent_bytes += nbytes
        return True

    def _receive_soon(self) -> bool:
        """Combine the peer's next block with ours, which was sent; True if it came."""
        if self._received == self._sent:
            return False
        block = self._blocks[self._received]
        nbytes = block.nbytes
        for _ in range(SPINS):
            view = self._channel.try_recv_whole(nbytes, align=BLOCK_BYTES)
            if view is not None:
                self._combine(block, torch.frombuffer(view, dtype=self._dtype))
                self._channel.give_back(nbytes)
                self._received += 1
                self.recv_bytes += nbytes
                return True
        return False

    def _combine(self, mine: Tensor, theirs: Tensor) -> None:
        first, second = (mine, theirs) if self._is_first else (theirs, mine)
        if self._op == ReduceOp.MAX:
            torch.maximum(first, second, out=mine)
        else:
            torch.add(first, second, out=mine)
        finish_average(mine, self._op, 2)
