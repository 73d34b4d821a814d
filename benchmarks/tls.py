"""What TLS costs a training run: two hosts on a link of 100 Mbit/s, with and without TLS in turn. Linux, root.

    python benchmarks/tls.py [--pairs 6] [--rate 100mbit]

The hosts are network namespaces. Both ranks hold two connections, one of them encrypted, and train the same GPT (7 MB
of gradients) over one and the other in alternating blocks. Ratio: tokens/s with TLS / without; median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import save

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from netns import lab

WORLD_SIZE = 2
PATIENCE = 20.0
BATCH, CONTEXT = 8, 128
STEPS = {"none": 4, "int8": 8}  # in a block: two or three seconds
PORTS = {"plain": 7001, "tls": 7002}
LIMIT = 0.9


def main() -> int:
    """Measure, print, save; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--rate", default="100mbit", help="of each host's way out")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(measure(arguments.rank, json.loads(sys.stdin.read()))), flush=True)
        return 0
    if reason := lab.missing():
        print(f"skipped: {reason}")
        return 0
    pairs = run_ranks(arguments.pairs, arguments.rate)
    figures = {compression: summarise(rows) for compression, rows in pairs.items()}
    print(json.dumps(figures, indent=2))
    save("tls", {"rate": arguments.rate, "figures": figures, "pairs": pairs})
    return int(any(figure["ratio"] < LIMIT for figure in figures.values()))


def run_ranks(pairs: int, rate: str) -> dict[str, list[dict[str, float]]]:
    """Rank 0's figures: for each compression the tokens/s of each pair of blocks."""
    from smolcluster.transport.security import new_token

    with lab.network(WORLD_SIZE, rate=rate) as hosts:
        job = {"token": new_token().hex(), "hosts": [hosts.address(r) for r in range(WORLD_SIZE)], "pairs": pairs}
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"{hosts.prefix}{rank}", sys.executable, __file__, "--rank", str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(WORLD_SIZE)
        ]
        try:
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write(json.dumps(job))
                rank.stdin.close()
            assert ranks[0].stdout is not None
            text = ranks[0].stdout.read()
            codes = [rank.wait(PATIENCE) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert codes == [0] * WORLD_SIZE, codes
    result: dict[str, list[dict[str, float]]] = json.loads(text)
    return result


def measure(rank: int, job: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """One rank: train over both kinds of connection in turn."""
    import torch

    from smolcluster.algorithms.classicdp import ClassicDP
    from smolcluster.cluster.rendezvous import join_world
    from smolcluster.collectives.tcp import TcpCommunicator
    from smolcluster.data.batch import Batch
    from smolcluster.device import prepare_process
    from smolcluster.models.gpt import GPT, GPTConfig
    from smolcluster.training.optim import optimizer_factory
    from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

    prepare_process()
    token, hosts = str(job["token"]).encode(), job["hosts"]

    def join(kind: str) -> TcpCommunicator:
        options, port = TcpOptions(PATIENCE, tls=kind == "tls"), PORTS[kind]
        listener = listen(hosts[rank], port, token=token, run_id=kind, rank=rank, options=options)
        world = join_world(
            rank=rank, world_size=WORLD_SIZE, name=f"rank{rank}", listener=listener, run_id=kind, patience=PATIENCE,
            leader_address=f"tcp://{hosts[0]}:{port}", network=TcpNetwork(token, options),
        )  # fmt: skip
        return TcpCommunicator(world)

    words = torch.randint(0, 256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))
    batches = [Batch(words[:, :-1].contiguous(), words[:, 1:].contiguous())]
    comms = {kind: join(kind) for kind in PORTS}
    pairs: dict[str, list[dict[str, float]]] = {}
    for compression, steps in STEPS.items():
        strategies = {
            kind: ClassicDP(
                GPT(GPTConfig(256, 192, 4, 4, 768, 0.0, CONTEXT), 0),
                optimizer_factory("adamw", 1e-3, 0.01),
                comm,
                compression=compression,
            )
            for kind, comm in comms.items()
        }

        def block(kind: str, steps: int, strategies: dict[str, ClassicDP] = strategies) -> float:
            comms[kind].barrier()
            start = time.perf_counter()
            for _ in range(steps):
                strategies[kind].train_step(batches)
            seconds = max(float(str(value)) for value in comms[kind].exchange(time.perf_counter() - start))
            return WORLD_SIZE * BATCH * CONTEXT * steps / seconds

        for kind in PORTS:
            block(kind, 2)
        rows = []
        for pair in range(job["pairs"]):
            order = list(PORTS)[:: 1 if pair % 2 == 0 else -1]
            speeds = {kind: block(kind, steps) for kind in order}
            rows.append({kind: round(speeds[kind], 1) for kind in PORTS})
        pairs[compression] = rows
    for comm in comms.values():
        comm.close()
    return pairs


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the pairs, and the spread of their ratios."""
    ratios = sorted(row["tls"] / row["plain"] for row in rows)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "lowest": round(ratios[0], 4),
        "highest": round(ratios[-1], 4),
        **{f"{kind}_tokens_per_s": round(statistics.median(row[kind] for row in rows), 1) for kind in PORTS},
    }


if __name__ == "__main__":
    sys.exit(main())
