"""Rows on their way to the ranks whose experts compute them, and back: an all-to-all that autograd sees through.

Idea      Experts lie on the ranks in runs, as equal as they can be. Rows come sorted by expert, so what one rank has
          for another is one piece. First all ranks tell each other how many rows they have for each expert, a few
          numbers; from then on each knows the lengths of all pieces, and only rows travel. Backward of the way there
          is the way back for gradients, and the other way round.

          rank 0 has    e0 e0 e1 | e2            and holds the experts e0 and e1
          rank 1 has    e0 | e2 e2 e2            and holds the expert e2
          rank 0 gets   e0 e0 e1 | e0            and sorts them by expert: e0 e0 e0 e1
          rank 1 gets   e2 | e2 e2 e2

Cost      Of r ranks each sends (r-1)/r of its rows, if its tokens like all ranks' experts alike, four times per layer:
          there and back, in forward and in backward; and 8 bytes per expert to each rank.
Breaks if the links are slow: every layer waits for them four times. Nothing is hidden behind computation.
Source    Lepikhin et al. 2020, GShard, arXiv:2006.16668, section 3.1
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals, see models/moe.py

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smolcluster.collectives.base import Communicator, Work


def expert_ranges(num_experts: int, world_size: int) -> list[range]:
    """Which experts lie on each rank: runs as equal as they can be; some are empty if there are fewer than ranks."""
    starts = [num_experts * rank // world_size for rank in range(world_size + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(world_size)]


class ExpertExchange:
    """The Exchange (models/moe.py) of a layer whose experts lie on several ranks.

    Attributes:
        rank: this rank.
        experts: numbers of those that lie here.
    """

    def __init__(self, comm: Communicator, num_experts: int) -> None:
        """Divide the experts.

        Args:
            comm: all ranks; nothing else may use it while a layer computes.
            num_experts: E.
        """
        self.rank = comm.rank
        self._comm = comm
        self._ranges = expert_ranges(num_experts, comm.world_size)
        self.experts = self._ranges[comm.rank]

    def all_counts(self, counts_E: Tensor) -> Tensor:
        """Each rank's rows for each expert: (R, E) int64 on the CPU, from this rank's (E,). Blocks."""
        own = counts_E.to("cpu", torch.int64)
        counts = own.new_empty(self._comm.world_size * len(own))
        _wait(self._comm, self._comm.all_gather(counts, own), "all_gather")
        return counts.view(self._comm.world_size, len(own))

    def to_experts(self, rows_MD: Tensor, kept_RE: Tensor) -> Tensor:
        """(M, D) by expert to (A, D) by own expert, and for each in the order of the ranks. Blocks; differentiable.

        Args:
            rows_MD: this rank's rows, sorted by expert; on any device.
            kept_RE: how many rows each rank has for each expert: (R, E) int64 on the CPU, the same on every rank.

        Raises:
            PeerLost: a rank is gone.
        """
        arrived_AD = all_to_all_rows(rows_MD, self._comm, self._arriving(kept_RE), self._leaving(kept_RE))
        return arrived_AD.index_select(0, self._by_expert(kept_RE).to(arrived_AD.device))

    def from_experts(self, rows_AD: Tensor, kept_RE: Tensor) -> Tensor:
        """The way back, (A, D) to (M, D); as `to_experts`."""
        by_rank = self._by_expert(kept_RE).argsort()
        rows_AD = rows_AD.index_select(0, by_rank.to(rows_AD.device))
        return all_to_all_rows(rows_AD, self._comm, self._leaving(kept_RE), self._arriving(kept_RE))

    def _leaving(self, kept_RE: Tensor) -> list[int]:
        """Rows of this rank for each rank's experts."""
        own = kept_RE[self.rank].tolist()
        return [sum(own[experts.start : experts.stop]) for experts in self._ranges]

    def _arriving(self, kept_RE: Tensor) -> list[int]:
        """Rows of each rank for the experts here."""
        counts: list[int] = kept_RE[:, self.experts.start : self.experts.stop].sum(dim=1).tolist()
        return counts

    def _by_expert(self, kept_RE: Tensor) -> Tensor:
        """Where the rows, sorted by expert, are among those that arrived, which are sorted by rank: (A,) on the CPU."""
        kept = kept_RE[:, self.experts.start : self.experts.stop]
        expert_of_row = torch.arange(len(self.experts)).repeat(len(kept)).repeat_interleave(kept.flatten())
        return expert_of_row.argsort(stable=True)


def all_to_all_rows(rows: Tensor, comm: Communicator, output_rows: Sequence[int], input_rows: Sequence[int]) -> Tensor:
    """Send rows of dim 0: the first input_rows[0] to rank 0, and so on; blocks. Differentiable, on all ranks alike.

    Args:
        rows: (sum of input_rows, ...), the same dtype and the same further dims on every rank; on any device.
        comm: the ranks.
        output_rows: how many come from each rank.
        input_rows: how many go to each rank.

    Returns:
        (sum of output_rows, ...), in the order of the ranks, where `rows` is.
    """
    out: Tensor = _AllToAllRows.apply(rows, comm, output_rows, input_rows)  # type: ignore[no-untyped-call]
    return out


class _AllToAllRows(torch.autograd.Function):
    """Rows go; in backward their gradients come back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, comm: Communicator, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> Tensor:
        ctx.comm, ctx.output_rows, ctx.input_rows = comm, output_rows, input_rows
        return _send_rows(rows, comm, output_rows, input_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _send_rows(grad, ctx.comm, ctx.input_rows, ctx.output_rows), None, None, None


def _send_rows(rows: Tensor, comm: Communicator, output_rows: Sequence[int], input_rows: Sequence[int]) -> Tensor:
    out = rows.new_empty(sum(output_rows), *rows.shape[1:])
    _wait(comm, comm.all_to_all(out, rows.detach().contiguous(), output_rows, input_rows), "all_to_all")
    return out


def _wait(comm: Communicator, work: Work, call: str) -> None:
    start = time.monotonic()
    work.wait()
    comm.telemetry.record("comm_wait", start, time.monotonic(), details={"call": call})
