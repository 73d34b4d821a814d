"""What fully_shard (FSDP2) over gloo takes by itself: plain torch, nothing of ours is imported.

    python benchmarks/fully_shard_alone.py [--stage 2] [--precision bf16] [--world 2] [--prefetch]

The same GPT, optimizer and batch of random bytes as ddp_alone.py, and fully_shard on each block and then on the model,
as its documentation shows. Three models take turns in the same processes: sharded over all ranks (`step_s`), sharded
over a mesh of one rank each, all at the same time (`alone_s`: its own work without a network), and the plain model in
rank 0 while the others wait (`plain_s`). `speedup` says how many times the tokens per second of the plain process all
ranks together have. It confirms `against_step_s` and `against_alone_s` of train_against_fully_shard.py.

On the CPU fully_shard has no streams: it waits for each collective. `--prefetch` lets all-gathers run beside computing,
with set_modules_to_forward_prefetch and a method that torch has not made public.
"""

from __future__ import annotations

import argparse
import contextlib
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
from ddp_alone import BATCH, GPT, SEQ, VOCAB, use_congestion
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
STEPS = 3


def sharded(model: GPT, mesh: DeviceMesh, arguments: argparse.Namespace) -> GPT:
    """The model, sharded in place. Stage 3 is the default: blocks are freed after forward, the rest is not."""
    options = {
        "mesh": mesh,
        "mp_policy": POLICIES[arguments.precision],
        "reshard_after_forward": None if arguments.stage == 3 else False,
    }
    blocks = [fully_shard(block, **options) for block in model.blocks]
    root = fully_shard(model, **options)
    if arguments.prefetch:
        root._set_unshard_async_op(True)
        for module, following in zip([root, *blocks], blocks, strict=False):
            module.set_modules_to_forward_prefetch([following])
    return model


def stepper(model: GPT, ids: torch.Tensor, *, autocasts: bool) -> Callable[[], None]:
    """A function that does one update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocasts else contextlib.nullcontext():
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def seconds_per_step(step: Callable[[], None], *, takes_part: bool) -> float:
    """Of the slowest rank, over a few steps after two to warm up."""
    if takes_part:
        step()
        step()
    dist.barrier()
    start = time.perf_counter()
    if takes_part:
        for _ in range(STEPS):
            step()
    longest = torch.tensor((time.perf_counter() - start) / STEPS)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=arguments.meeting, rank=arguments.rank, world_size=arguments.world)
    meshes = init_device_mesh("cpu", (arguments.world, 1), mesh_dim_names=("all", "alone"))
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(arguments.rank))
    steps: dict[str, Callable[[], None]] = {}
    for name in ("step_s", "alone_s", "plain_s"):
        torch.manual_seed(0)
        model, is_plain = GPT(), name == "plain_s"
        if not is_plain:
            sharded(model, meshes["all" if name == "step_s" else "alone"], arguments)
        steps[name] = stepper(model, ids, autocasts=is_plain and arguments.precision == "bf16")
    steps["step_s"]()
    use_congestion(arguments.congestion)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(arguments.blocks):
        for name in list(steps)[:: 1 if block % 2 == 0 else -1]:
            takes_part = name != "plain_s" or arguments.rank == 0
            times[name].append(seconds_per_step(steps[name], takes_part=takes_part))
    if arguments.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(json.dumps({**medians, "speedup": arguments.world * medians["plain_s"] / medians["step_s"]}))
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=list(POLICIES), default="fp32")
    parser.add_argument("--stage", type=int, choices=[2, 3], default=3, help="2: reshard_after_forward=False")
    parser.add_argument("--prefetch", action="store_true", help="all-gathers run while the block before computes")
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
