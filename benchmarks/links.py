"""All-reduce between hosts that shaped links join: network namespaces, made by a `netlab` script. Linux, root.

    python benchmarks/links.py --netlab PATH line      how much of the line's rate is used, fp32, worlds 2 and 3
    python benchmarks/links.py --netlab PATH int8      int8 against fp32: times, and bytes counted on the interface
    python benchmarks/links.py --netlab PATH latency   4 KiB at world 3 with a round trip of 5 ms, against gloo

`netlab up N RATE ONE_WAY_MS`, `netlab down` make and remove the hosts PREFIX1 ... PREFIXN with 198.18.0.1 ....
Each rank of world N sends 2(N-1)/N of the tensor, so an all-reduce at line rate takes 2(N-1)/N * bytes * 8 / rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import save

from smolcluster.bench.all_reduce import Options, bench_all_reduce

MIB = 1 << 20
RATES = {"1gbit": 1e9, "100mbit": 1e8}


@contextlib.contextmanager
def hosts(netlab: Path, world: int, rate: str, one_way_ms: float = 0.0) -> Iterator[None]:
    """Make the namespaces; they are gone afterwards."""
    environment = {**os.environ, "NETLAB_PREFIX": f"bench{os.getpid()}x"}
    shape = [str(world), rate, *([str(one_way_ms)] if one_way_ms else [])]
    subprocess.run([netlab, "up", *shape], check=True, env=environment)
    try:
        yield
    finally:
        subprocess.run([netlab, "down"], check=True, env=environment)


def measure(world: int, sizes: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """Time all-reduces between the hosts that `hosts` made."""
    return bench_all_reduce(
        world,
        Options(sizes, congestion="default", interface="eth0", **options),
        hosts=[f"198.18.0.{rank + 1}" for rank in range(world)],
        prefix=lambda rank: ["ip", "netns", "exec", f"bench{os.getpid()}x{rank + 1}", "env", "GLOO_SOCKET_IFNAME=eth0"],
    )  # fmt: skip


def line(netlab: Path, runs: int) -> list[dict[str, Any]]:
    """The share of the line's rate that payload takes."""
    rows = []
    for rate, bits_per_s in RATES.items():
        for world in (2, 3):
            sizes = [4 * MIB, 16 * MIB, *([64 * MIB] if rate == "1gbit" else [])]
            with hosts(netlab, world, rate):
                for row in measure(world, sizes, against="gloo", runs=runs):
                    ideal_ms = 2 * (world - 1) / world * row["bytes"] * 8 / bits_per_s * 1e3
                    rows.append({"rate": rate, **row, "share": ideal_ms / row["tcp_ms"]})
                    rows[-1]["gloo_share"] = ideal_ms / row["gloo_ms"]
                    print(json.dumps(rows[-1]))
    return rows


def int8(netlab: Path, runs: int) -> list[dict[str, Any]]:
    """How much faster int8 is than fp32, and how many bytes it takes."""
    rows = []
    for rate, world, nbytes in (("1gbit", 2, 64 * MIB), ("1gbit", 3, 64 * MIB), ("100mbit", 2, 8 * MIB)):
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        with hosts(netlab, world, rate):
            for _ in range(runs):  # alternating, one short measurement of each
                (plain,) = measure(world, [nbytes], against=None, runs=2)
                (small,) = measure(world, [nbytes], against=None, runs=2, compression="int8")
                pairs.append((plain, small))
        ratios = sorted(plain["tcp_ms"] / small["tcp_ms"] for plain, small in pairs)
        rows.append({
            "rate": rate, "world": world, "bytes": nbytes,
            "fp32_ms": [plain["tcp_ms"] for plain, _ in pairs], "int8_ms": [small["tcp_ms"] for _, small in pairs],
            "faster": ratios[len(ratios) // 2], "faster_range": [ratios[0], ratios[-1]],
            "bytes_ratio": max(small["sent_bytes"] / plain["sent_bytes"] for plain, small in pairs),
        })  # fmt: skip
        print(json.dumps(rows[-1]))
    return rows


def latency(netlab: Path, runs: int) -> list[dict[str, Any]]:
    """Small tensors where the round trip decides."""
    with hosts(netlab, 3, "1gbit", 2.5):
        rows = measure(3, [4 << 10], against="gloo", runs=runs)
    for row in rows:
        row["time_ratio"] = row["tcp_ms"] / row["gloo_ms"]
        print(json.dumps(row))
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["line", "int8", "latency"])
    parser.add_argument("--netlab", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    kinds = {"line": line, "int8": int8, "latency": latency}
    rows = kinds[arguments.what](arguments.netlab.resolve(), arguments.runs)
    save(f"links_{arguments.what}", {"rows": rows})


if __name__ == "__main__":
    main()
