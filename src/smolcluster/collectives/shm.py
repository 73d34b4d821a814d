"""All-reduce of two ranks that share memory.

Both send all that they have, and each adds the other's numbers to its own: block by block, straight from the memory of
the other's ring. A block is added right after it was sent, while the processor's cache still has it; so each number
comes from main memory once and goes back once. A ring would move as many bytes in two rounds.

Source: the recursive doubling of Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
operations in MPICH", section 4, whose one round for two ranks this is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.wire import finish_average
from smolcluster.transport.shm import SharedMemoryChannel

# 256 KiB: Python's part shows; 1 MiB: two of them and their copies are too much for the cache.
BLOCK_BYTES = 512 << 10
# Blocks that go both ways before the loop looks after other lanes.
BLOCKS_PER_TURN = 16
# Looks for the peer's next block, of 0.1 us, before something else is done: it comes in step with ours.
LOOKS = 400


class Swap:
    """An all-reduce of two ranks on the channel between them. Both combine in rank order, so both hold the same bits.

    Cost: a + S * b.
    """

    def __init__(
        self, channel: SharedMemoryChannel, tensors: Sequence[Tensor], op: ReduceOp, *, is_first: bool
    ) -> None:
        """Send nothing yet.

        Args:
            channel: to the other rank.
            tensors: (n,) each, of one dtype, on the CPU; reduced in place. As many and as long on both ranks.
            op: SUM, AVG or MAX.
            is_first: this is the lower rank of the two.
        """
        self.sent_bytes = 0
        self.recv_bytes = 0
        self._channel = channel
        self._nbytes = sum(tensor.nbytes for tensor in tensors)
        self._dtype = tensors[0].dtype
        # None has parts of two tensors: parts that begin at odd places take longer to copy.
        block = BLOCK_BYTES // self._dtype.itemsize
        self._blocks = [part for tensor in tensors for part in torch.split(tensor, block) if part.numel()]
        self._sent = 0  # blocks
        self._received = 0
        self._op = op
        self._is_first = is_first

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
        mine = self._blocks[self._received]
        nbytes = mine.nbytes
        view = self._channel.try_recv_whole(nbytes, align=BLOCK_BYTES, looks=LOOKS)
        if view is None:
            return False
        theirs = torch.frombuffer(view, dtype=self._dtype)
        if self._op == ReduceOp.MAX:
            # Of 0 and -0, torch takes the first.
            first, second = (mine, theirs) if self._is_first else (theirs, mine)
            torch.maximum(first, second, out=mine)
        else:
            mine.add_(theirs)  # a + b and b + a are the same bits; half the time of torch.add with `out`
        finish_average(mine, self._op, 2)
        self._channel.give_back(nbytes)
        self._received += 1
        self.recv_bytes += nbytes
        return True
