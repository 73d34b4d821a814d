"""gloo's all-reduce with nothing of ours in the process: does `smolcluster bench all-reduce` treat gloo fairly?

    python benchmarks/gloo_alone.py --world 2 --sizes 4096,262144,4194304,67108864 [--congestion reno]

Only torch and the standard library. `--congestion` is set on gloo's sockets, which takes Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK_SECONDS = 0.1
RUNS = 9


def measure(rank: int, world: int, meeting: str, sizes: list[int], congestion: str | None) -> list[dict[str, float]]:
    """One rank: median milliseconds for each size, of the slowest rank in each block."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    dist.barrier()
    if congestion is not None:
        set_congestion(congestion)
    rows = []
    for nbytes in sizes:
        tensor = torch.zeros(nbytes // 4)
        calls, times = 2, []
        for run in range(RUNS + 2):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                dist.all_reduce(tensor)
            slowest = torch.tensor([(time.perf_counter() - start) / calls], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if run == 1:  # warm by now
                calls = max(3, min(1000, int(BLOCK_SECONDS / float(slowest))))
            elif run > 1:
                times.append(float(slowest) * 1e3)
        rows.append({"bytes": nbytes, "gloo_ms": statistics.median(times), "least": min(times), "most": max(times)})
    dist.destroy_process_group()
    return rows


def set_congestion(name: str) -> None:
    """Set it on every TCP socket of this process."""
    for number in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(number))) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError:
            continue


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--sizes", default="4096,262144,4194304,67108864", help="bytes")
    parser.add_argument("--congestion")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.rank is not None:
        rows = measure(arguments.rank, arguments.world, arguments.meeting, sizes, arguments.congestion)
        if arguments.rank == 0:
            print(json.dumps(rows))
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--meeting", meeting],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(arguments.world)
        ]
        codes = [rank.wait() for rank in ranks]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
