"""What DistributedDataParallel over gloo takes by itself: plain torch, nothing of ours is imported.

    python benchmarks/ddp_alone.py [--precision bf16] [--world 2]

The same GPT (6 layers, 256 wide, tied head), optimizer and batch of random bytes as train_against_ddp.py. It confirms
the figure that we compare with: `against_step_s` and `against_alone_s` there, `step_s` and `alone_s` here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LAYERS, DIM, HEADS, VOCAB, SEQ, BATCH = 6, 256, 4, 256, 128, 8


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = (part.transpose(1, 2) for part in self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Bytes to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(SEQ, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)  # with std 1, denormals make a step 12 times slower

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, V)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=arguments.meeting, rank=arguments.rank, world_size=arguments.world)
    model = DistributedDataParallel(GPT(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1))

    def step(communicates: bool) -> None:
        optimizer.zero_grad()
        half = torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else contextlib.nullcontext()
        with contextlib.nullcontext() if communicates else model.no_sync():
            with half:
                loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    step(True)
    use_congestion(arguments.congestion)
    times: dict[bool, list[float]] = {True: [], False: []}
    for block in range(2 * arguments.blocks):
        communicates = block % 2 == 0
        for _ in range(2):
            step(communicates)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(3):
            step(communicates)
        longest = torch.tensor((time.perf_counter() - start) / 3)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        times[communicates].append(longest.item())
    if arguments.rank == 0:
        print(json.dumps({"step_s": statistics.median(times[True]), "alone_s": statistics.median(times[False])}))
    dist.destroy_process_group()


def use_congestion(name: str) -> None:
    """Set the congestion control of all TCP sockets of this process; Linux only."""
    if not name:
        return
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as sock:
            if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
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
        more = ["--meeting", f"file://{folder}/meeting"]
        command = [sys.executable, __file__, *sys.argv[1:], *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(arguments.world)]
        if sum(rank.wait() != 0 for rank in ranks):
            sys.exit("a rank failed")


if __name__ == "__main__":
    main()
