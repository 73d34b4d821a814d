"""What torch.distributed.pipelining over gloo takes by itself: plain torch, nothing of ours is imported.

    python benchmarks/pipelining_alone.py [--schedule gpipe] [--micro-batches 8] [--world 2]

The GPT and the batch of train_against_pipelining.py (8 blocks, 256 wide, tied head, 16 x 128 random bytes), cut into as
many blocks a rank. Two ways of training take turns in the same processes: the pipeline (`step_s`), and the whole model
in rank 0 while the others wait, with the micro-batches one after the other (`accumulating_s`) and with the whole batch
at once (`whole_s`). `speedup` and `speedup_of_whole` say how many times their tokens per second the pipeline has. It
confirms `against_step_s` of train_against_pipelining.py; `losses` shows that all train the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_alone import DIM, SEQ, VOCAB, Block, use_congestion
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

LAYERS, BATCH, STEPS = 8, 16, 2
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class GPT(nn.Module):
    """Bytes to logits, or the part of it that one rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(SEQ, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.is_first = self.is_last = True
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)  # with std 1, denormals make a step 12 times slower

    def keep(self, rank: int, world: int) -> GPT:
        """Remove what other ranks have. The embedding is on the first and, as the head, on the last."""
        self.blocks = self.blocks[LAYERS * rank // world : LAYERS * (rank + 1) // world]
        self.is_first, self.is_last = rank == 0, rank == world - 1
        if not self.is_first:
            del self.positions
        if not self.is_last:
            del self.norm
        if not (self.is_first or self.is_last):
            del self.tokens
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) or (B, T, D) to (B, T, D) or (B, T, V)."""
        if self.is_first:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight) if self.is_last else x


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Over all targets."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pipelined(model: GPT, ids: torch.Tensor, arguments: argparse.Namespace) -> Callable[[], float | None]:
    """A function that does one update of the pipeline and gives the last rank its loss."""
    parts, world, rank = arguments.micro_batches, arguments.world, arguments.rank
    model.keep(rank, world)
    stage = PipelineStage(model, rank, world, torch.device("cpu"))
    schedule = SCHEDULES[arguments.schedule](
        stage, parts, lambda logits, targets: mean_loss(logits, targets) / parts, scale_grads=False
    )
    ends = dist.new_group([0, world - 1])
    params = list(model.parameters())
    counted = [param for param in params if model.is_first or not model.is_last or param is not model.tokens.weight]
    optimizer = torch.optim.AdamW(params, lr=3e-4, fused=True)

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        inputs = (ids[:, :-1],) if model.is_first else ()
        schedule.step(*inputs, target=ids[:, 1:] if model.is_last else None, losses=losses, return_outputs=False)
        if model.is_first or model.is_last:
            dist.all_reduce(model.tokens.weight.grad, group=ends)
        square = get_total_norm([param.grad for param in counted if param.grad is not None]) ** 2
        dist.all_reduce(square)
        clip_grads_with_norm_(params, 1.0, square.sqrt())
        optimizer.step()
        return float(torch.stack(losses).detach().sum()) if losses else None

    return step


def plain(model: GPT, ids: torch.Tensor, parts: int) -> Callable[[], float | None]:
    """A function that does one update of the whole model, in so many micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> float | None:
        optimizer.zero_grad()
        losses = []
        for part in ids.chunk(parts):
            loss = mean_loss(model(part[:, :-1]), part[:, 1:]) / parts
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(torch.stack(losses).sum())

    return step


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=arguments.meeting, rank=arguments.rank, world_size=arguments.world)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], float | None]] = {}
    for name, parts in (("step_s", 0), ("accumulating_s", arguments.micro_batches), ("whole_s", 1)):
        torch.manual_seed(0)
        steps[name] = plain(GPT(), ids, parts) if parts else pipelined(GPT(), ids, arguments)
    steps["step_s"]()
    use_congestion(arguments.congestion)
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for block in range(arguments.blocks):
        for name in list(steps)[:: 1 if block % 2 == 0 else -1]:
            takes_part = name == "step_s" or arguments.rank == 0
            warm_up = 0 if name == "step_s" and block == 0 else 1  # the pipeline has done a step already
            for _ in range(warm_up if takes_part else 0):
                steps[name]()
            dist.barrier()
            start = time.perf_counter()
            loss = [steps[name]() for _ in range(STEPS)][-1] if takes_part else None
            figures = torch.tensor([(time.perf_counter() - start) / STEPS, -1.0 if loss is None else loss])
            dist.all_reduce(figures, dist.ReduceOp.MAX)
            seconds, losses[name] = figures.tolist()
            times[name].append(seconds)
    if arguments.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        pairs = list(zip(*times.values(), strict=True))
        print(
            json.dumps(
                {
                    **medians,
                    "speedup": statistics.median(accumulating / step for step, accumulating, _ in pairs),
                    "speedup_of_whole": statistics.median(whole / step for step, _, whole in pairs),
                    "losses": losses,
                }
            )
        )
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="1f1b")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--congestion", default="", help="for all sockets; default: the system's")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--meeting", f"file://{folder}/meeting"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(arguments.world)]
        if sum(rank.wait() != 0 for rank in ranks):
            sys.exit("a rank failed")


if __name__ == "__main__":
    main()
