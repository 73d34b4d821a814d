"""All-reduce against gloo on loopback: worlds 2 and 4, equal and default congestion control, TCP and shared memory.

    python benchmarks/all_reduce.py            as whoever runs it; root also measures without root's rights (setpriv)
    python benchmarks/all_reduce.py --quick    what `make bench` shows: world 2, a few runs, nothing saved

Beside it stands what benchmarks/gloo_alone.py measures, without our code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import save

# What an ordinary user may do: root's other rights are gone, its files (this checkout may be its own) are not.
AS_ORDINARY_USER = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
SIZES = "4KiB,256KiB,4MiB,64MiB"
SIZES_BYTES = "4096,262144,4194304,67108864"


def bench(user: list[str], *options: str) -> list[dict[str, Any]]:
    """One `smolcluster bench all-reduce`."""
    command = [*user, sys.executable, "-m", "smolcluster", "bench", "all-reduce", "--against", "gloo", "--json"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    for row in rows:
        low, high = row["ratio_range"]
        print(
            f"{' '.join(options)}: {row['bytes']:>9} bytes {row['tcp_ms']:8.3f} ms, gloo {row['gloo_ms']:8.3f} ms, "
            f"ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f}), {row['congestion']}",
            flush=True,
        )
    return rows


def alone(world: int) -> list[dict[str, Any]]:
    """gloo without our code."""
    script = Path(__file__).parent / "gloo_alone.py"
    command = [sys.executable, str(script), "--world", str(world), "--sizes", SIZES_BYTES, "--congestion", "reno"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"gloo alone, world {world}: {done.stdout.strip()}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        bench([], "--world", "2", "--sizes", SIZES)
        return
    users: dict[str, list[str]] = {"this user": []}
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("setpriv"):
        users["ordinary user"] = AS_ORDINARY_USER
    figures: dict[str, Any] = {}
    for name, user in users.items():
        for world in ("2", "4"):
            for congestion in ("equal", "default"):
                options = ("--world", world, "--sizes", SIZES, "--congestion", congestion)
                figures[f"{name}, world {world}, {congestion}"] = bench(user, *options)
    figures["shared memory, world 2"] = bench([], "--world", "2", "--sizes", SIZES, "--link", "shm")
    figures |= {f"gloo alone, world {world}": alone(world) for world in (2, 4)}
    save("all_reduce", figures)


if __name__ == "__main__":
    main()
