"""What a rank of fsdp holds in each stage, against ZeRO's formulas; and a model that fits on no rank by itself.

    python benchmarks/fsdp_memory.py                       stages 0 to 3 at 2 and 3 ranks, a GPT of 85 M parameters
    python benchmarks/fsdp_memory.py --cgroup --stage 3    each rank may use 60 % of what one process needs (root)

Memory: parameters, gradients and optimizer state as summary.json has them, in fp32 with AdamW: 16, 8 + 8/N, 4 + 12/N
and 16/N bytes per parameter, 5 % of it, and at most two units and two buckets. Beside it the peak of each rank's
resident memory, less that of a process that has only imported all.

--cgroup: `single` trains with no limit and tells its peak; then every rank of stage 3 trains in a memory cgroup of 60 %
of it, without swap, and its losses are compared. A rank that needs more is killed by the system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from machine import save

ROOT = Path(__file__).parent.parent
MIB = 2**20
# 85 M parameters: 16 bytes each are 1.36 GB.
MODEL = {
    "model.type": "gpt", "model.model_dim": 768, "model.num_layers": 12, "model.num_heads": 12, "model.ff_dim": 3072,
    "model.max_seq_len": 64, "model.dropout": 0, "data.dataset": "pydoc", "data.tokenizer": "bytes",
    "training.device": "cpu", "training.eval_steps": "null", "training.learning_rate": 3e-4,
    "training.grad_clip_norm": 1.0, "cluster.shared_memory": "off",
}  # fmt: skip
CGROUPS = Path("/sys/fs/cgroup")


def train(
    folder: Path, *arguments: str, model: dict[str, Any] = MODEL, limit_bytes: int | None = None
) -> dict[str, Any]:
    """Run `smolcluster train`; the summary. With a limit every rank is put into a cgroup of its own at its start."""
    overrides = [part for key, value in model.items() for part in ("--override", f"{key}={value}")]
    command = [sys.executable, "-m", "smolcluster", "train", "--quiet", "--out", str(folder), *overrides, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as groups:
        if limit_bytes is not None:
            _confine(process, limit_bytes, groups)
        _, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit {process.returncode}: {err}")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary["losses"] = [row["train/loss"] for row in rows if row["rank"] == 0 and "train/loss" in row]
    return summary


def _confine(process: subprocess.Popen[str], limit_bytes: int, groups: contextlib.ExitStack) -> None:
    """Move each rank into a memory cgroup before it has made anything large: its import alone takes seconds."""
    seen: set[int] = set()
    parent = psutil.Process(process.pid)
    while process.poll() is None and len(seen) < 3:
        with contextlib.suppress(psutil.Error):
            for child in parent.children():
                if child.pid not in seen and "smolcluster.run.rank" in child.cmdline():
                    groups.enter_context(memory_cgroup(child.pid, limit_bytes))
                    seen.add(child.pid)


@contextlib.contextmanager
def memory_cgroup(pid: int, limit_bytes: int) -> Iterator[None]:
    """Let a process and its children use so much memory, and no swap. cgroup v1 or v2; needs root."""
    is_v1 = (CGROUPS / "memory").is_dir()
    folder = (CGROUPS / "memory" if is_v1 else CGROUPS) / f"smolcluster-{pid}"
    folder.mkdir()
    try:
        if is_v1:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # not in every kernel; without swap space it changes nothing
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        else:
            (folder / "memory.max").write_text(str(limit_bytes))
            with contextlib.suppress(OSError):
                (folder / "memory.swap.max").write_text("0")
        (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def zero_bytes(stage: int, world_size: int) -> float:
    """Bytes per parameter, fp32 and AdamW (Rajbhandari et al. 2020, section 5, with 4-byte numbers throughout)."""
    return [16.0, 8 + 8 / world_size, 4 + 12 / world_size, 16 / world_size][stage]


def baseline_bytes() -> int:
    """Peak of a rank that has imported everything and trains 10 numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny = {**MODEL, "model.model_dim": 16, "model.num_layers": 1, "model.num_heads": 1, "model.ff_dim": 16}
        summary = train(Path(scratch) / "run", "--algorithm", "fsdp", "--local", "2", "--max-steps", "2",
                        "--override", "training.batch_size=1", model=tiny)  # fmt: skip
        return int(max(summary["peak_rss_bytes"]))


def stages(world_sizes: Sequence[int], chosen: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """All stages at all numbers of ranks."""
    baseline = baseline_bytes()
    found = []
    for world_size in world_sizes:
        for stage in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                summary = train(
                    Path(scratch) / "run", "--algorithm", "fsdp", "--local", str(world_size), "--max-steps", str(steps),
                    "--override", f"cluster.fsdp_stage={stage}", "--override", "training.batch_size=1",
                )  # fmt: skip
            psi = summary["parameters"]
            kinds = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
            held = [sum(summary[kind][rank] for kind in kinds) for rank in range(world_size)]
            expected = zero_bytes(stage, world_size) * psi
            width, ff = MODEL["model.model_dim"], MODEL["model.ff_dim"]
            unit = 4 * (4 * width * width + 2 * width * ff + ff + 9 * width)  # a block; the embedding is smaller
            bucket = max(4 * width * ff, 4 * MIB)  # one matrix is larger than cluster.bucket_bytes
            allowed = 1.05 * expected + (2 * unit if stage == 3 else 0) + (2 * bucket if stage >= 2 else 0)
            row = {
                "world_size": world_size, "stage": stage, "parameters": psi, "held_mib": round(max(held) / MIB, 1),
                "zero_mib": round(expected / MIB, 1), "ratio": round(max(held) / expected, 3),
                "allowed_mib": round(allowed / MIB, 1), "holds": max(held) <= allowed,
                **{kind: max(summary[kind]) for kind in kinds},
                "peak_rss_over_import_mib": [round((rss - baseline) / MIB) for rss in summary["peak_rss_bytes"]],
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def confined(stage: int, world_size: int, steps: int) -> dict[str, Any]:
    """`single` without a limit, then `fsdp` with 60 % of its peak for each rank."""
    batch = ("--override", f"training.batch_size={world_size}"), ("--override", "training.batch_size=1")
    length = ("--max-steps", str(steps))
    with tempfile.TemporaryDirectory() as scratch:
        alone = train(Path(scratch) / "single", "--algorithm", "single", *length, *batch[0])
        limit_bytes = round(0.6 * alone["peak_rss_bytes"][0])
        print(f"single: peak {alone['peak_rss_bytes'][0] / MIB:.0f} MiB; each rank may use {limit_bytes / MIB:.0f}")
        shared = train(
            Path(scratch) / "fsdp", "--algorithm", "fsdp", "--local", str(world_size), *length, *batch[1],
            "--override", f"cluster.fsdp_stage={stage}", limit_bytes=limit_bytes,
        )  # fmt: skip
    row = {
        "stage": stage, "world_size": world_size, "steps": len(shared["losses"]), "parameters": alone["parameters"],
        "single_peak_mib": round(alone["peak_rss_bytes"][0] / MIB), "limit_mib": round(limit_bytes / MIB),
        "rank_peak_mib": [round(rss / MIB) for rss in shared["peak_rss_bytes"]],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(alone["losses"], shared["losses"], strict=True)),
        "first_and_last_loss": [shared["losses"][0], shared["losses"][-1]],
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cgroup", action="store_true")
    parser.add_argument("--stage", type=int, action="append")
    parser.add_argument("--world-size", type=int, action="append")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.cgroup:
        stage, world_size = (options.stage or [3])[0], (options.world_size or [3])[0]
        save("fsdp_cgroup", confined(stage, world_size, options.steps or 30))
    else:
        sizes, chosen = options.world_size or [2, 3], options.stage or [0, 1, 2, 3]
        save("fsdp_memory", {"runs": stages(sizes, chosen, options.steps or 3)})


if __name__ == "__main__":
    main()
