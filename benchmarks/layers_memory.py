"""A model that fits on no rank by itself trains with its layers over three.

    python benchmarks/layers_memory.py            mp, and mp_pipeline with three micro-batches (root: memory cgroups)

`single` trains with no limit and tells its peak; then every rank trains in a memory cgroup of 60 % of it, without swap,
and its losses are compared. A rank that needs more is killed by the system. The model and the groups are those of
fsdp_memory.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fsdp_memory import MIB, train
from machine import save

RANKS = 3


def confined(steps: int) -> list[dict[str, Any]]:
    """`single` without a limit, then each algorithm with 60 % of its peak for each rank."""
    common = ("--max-steps", str(steps), "--override", f"training.batch_size={RANKS}")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        alone = train(Path(scratch) / "single", "--algorithm", "single", *common)
        limit_bytes = round(0.6 * alone["peak_rss_bytes"][0])
        print(f"single: peak {alone['peak_rss_bytes'][0] / MIB:.0f} MiB; each rank may use {limit_bytes / MIB:.0f}")
        for algorithm, micro_batches in (("mp", 1), ("mp_pipeline", RANKS)):
            divided = train(
                Path(scratch) / algorithm, "--algorithm", algorithm, "--local", str(RANKS), *common,
                "--override", f"training.micro_batches={micro_batches}", limit_bytes=limit_bytes,
            )  # fmt: skip
            row = {
                "algorithm": algorithm, "world_size": RANKS, "steps": len(divided["losses"]),
                "parameters": alone["parameters"], "single_peak_mib": round(alone["peak_rss_bytes"][0] / MIB),
                "limit_mib": round(limit_bytes / MIB),
                "rank_peak_mib": [round(rss / MIB) for rss in divided["peak_rss_bytes"]],
                "held_mib": [
                    round(sum(parts) / MIB)
                    for parts in zip(
                        divided["parameter_bytes"], divided["gradient_bytes"], divided["optimizer_bytes"], strict=True
                    )
                ],
                "largest_loss_difference": max(
                    abs(mine - theirs) for mine, theirs in zip(alone["losses"], divided["losses"], strict=True)
                ),
                "first_and_last_loss": [divided["losses"][0], divided["losses"][-1]],
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def main() -> None:
    """Measure, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    save("layers_memory", {"runs": confined(parser.parse_args().steps)})


if __name__ == "__main__":
    main()
