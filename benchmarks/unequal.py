"""Machines of unequal speed, 4 : 2 : 1: what edp, and classicdp with `shares: auto`, make of them. Linux, root.

    python benchmarks/unequal.py [--seconds 40] [--rounds 3]
    python benchmarks/unequal.py --straggler

Each worker's process gets a CPU quota (control group `cpu`, period 10 ms; the server has none). Solo: the samples/s of
each under its quota, `single`. Together: edp with even leases; classicdp K = 0 with even and with automatic shares;
edp without the slowest. Figures are rates after the start, in samples/s that count, as parts of the summed solo rates.

--straggler: syncps with a timeout of 0.1 s, two workers and one that is five times slower, beside the two alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from machine import save

# Cores that each worker gets: together 1.4, so that two cores have something left for the server.
CORES = (0.8, 0.4, 0.2)
PERIOD_US = 10_000
GROUPS = Path("/sys/fs/cgroup/cpu")
# A step of the fastest takes more than half a second.
SETTINGS = {
    "model.model_dim": 128, "model.num_layers": 4, "model.ff_dim": 512, "model.max_seq_len": 128,
    "training.max_steps": 100_000, "training.eval_steps": "null", "training.learning_rate": 1e-3,
    "lr_schedule.kind": "constant", "training.epochs": "null", "cluster.patience": 30,
}  # fmt: skip
BATCH = 24
STARTED = re.compile(r"rank started rank=(\d+) world_size=\d+ pid=(\d+)")
EDP_PART, CLASSIC_PART = 0.9, 0.8
# Cores of two workers and of one that is five times slower.
STRAGGLER_CORES = (0.5, 0.5, 0.1)
STRAGGLER_PART = 0.9


def main() -> int:
    """Measure, print, save; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement, after the start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--straggler", action="store_true")
    arguments = parser.parse_args()
    if not os.access(GROUPS / "cpu.cfs_quota_us", os.F_OK) and not os.access(GROUPS, os.W_OK):
        print("skipped: no control group for cpu that this user may change")
        return 0
    if arguments.straggler:
        return measure_straggler(arguments.seconds, arguments.rounds)
    rounds = [measure_round(arguments.seconds) for _ in range(arguments.rounds)]
    figures = {
        key: [round(entry[key], 3) for entry in rounds]
        for key in ("edp", "edp_without_slowest", "classicdp_auto", "classicdp_even")
    }
    summary = {key: {"median": statistics.median(parts), "runs": parts} for key, parts in figures.items()}
    print(json.dumps(summary, indent=2))
    save("unequal", {"cores": CORES, "seconds": arguments.seconds, "parts_of_summed_solo": summary, "rounds": rounds})
    medians = {key: statistics.median(parts) for key, parts in figures.items()}
    holds = (
        medians["edp"] >= EDP_PART
        and medians["classicdp_auto"] >= CLASSIC_PART
        and medians["edp"] >= medians["edp_without_slowest"]
    )
    return int(not holds)


def measure_round(seconds: float) -> dict[str, float]:
    """All figures once: solo rates in samples/s, the others as parts of their sum."""
    solo = [rate(["--algorithm", "single"], [cores], seconds) for cores in CORES]
    total = sum(solo)
    edp = rate(["--algorithm", "edp", "--local", "4"], [None, *CORES], seconds)
    without = rate(["--algorithm", "edp", "--local", "3"], [None, *CORES[:2]], seconds)
    classic = ["--algorithm", "classicdp", "--local", "3", "--override", "cluster.shared_memory=off"]
    auto = rate([*classic, "--override", "cluster.shares=auto"], CORES, seconds)
    even = rate(classic, CORES, seconds)
    entry = {
        "solo_fast": solo[0], "solo_middle": solo[1], "solo_slow": solo[2], "edp": edp / total,
        "edp_without_slowest": without / total, "classicdp_auto": auto / total, "classicdp_even": even / total,
    }  # fmt: skip
    print(json.dumps({key: round(value, 3) for key, value in entry.items()}), flush=True)
    return entry


def measure_straggler(seconds: float, rounds: int) -> int:
    """Print and save; the exit code."""
    syncps = ["--algorithm", "syncps", "--override", "cluster.timeout=0.1"]
    parts = []
    for _ in range(rounds):
        alone = rate([*syncps, "--local", "3"], [None, *STRAGGLER_CORES[:2]], seconds)
        together = rate([*syncps, "--local", "4"], [None, *STRAGGLER_CORES], seconds)
        parts.append(together / alone)
        print(json.dumps({"two_alone": alone, "with_straggler": together, "part": parts[-1]}), flush=True)
    save("unequal_straggler", {"cores": STRAGGLER_CORES, "seconds": seconds, "parts_of_two_alone": parts})
    return int(statistics.median(parts) < STRAGGLER_PART)


def rate(options: Sequence[str], cores: Sequence[float | None], seconds: float) -> float:
    """Samples/s that count in a run whose ranks have so many cores each; None: as many as there are."""
    out = Path(tempfile.mkdtemp(prefix="unequal-"))
    command = [sys.executable, "-m", "smolcluster", "train", "--preset", "single_gpt", "--quiet", "--out", str(out)]
    command += [*options, "--override", f"training.batch_size={BATCH}"]
    for key, value in SETTINGS.items():
        command += ["--override", f"{key}={value}"]
    with quotas(cores) as groups, (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            if len(cores) == 1:
                confine(groups[0], process.pid)
            else:
                for rank, pid in started(out, len(cores)).items():
                    confine(groups[rank], pid)
            return counted(out / "metrics.jsonl", seconds)
        finally:
            end(process)
            shutil.rmtree(out, ignore_errors=True)


def counted(metrics: Path, seconds: float) -> float:
    """Rank 0's samples/s over `seconds`, from some steps after the first on."""
    deadline = time.monotonic() + 180
    while (rows := read(metrics)) is None or len(rows) < 6:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no steps in {metrics}")
        time.sleep(0.2)
    first = rows[-1][0] + seconds / 4  # by then shares have settled
    while not (rows := read(metrics) or []) or rows[-1][0] < first + seconds:
        if time.monotonic() > deadline + 4 * seconds:
            raise RuntimeError(f"too few steps in {metrics}")
        time.sleep(0.5)
    begin = next(index for index, row in enumerate(rows) if row[0] >= first)
    return sum(samples for _, samples in rows[begin + 1 :]) / (rows[-1][0] - rows[begin][0])


def read(metrics: Path) -> list[tuple[float, int]] | None:
    """(time, samples) of rank 0's steps so far."""
    if not metrics.is_file():
        return None
    rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(row["time"], row["train/samples"]) for row in rows if row["rank"] == 0 and "train/samples" in row]


def started(out: Path, count: int) -> dict[int, int]:
    """The process of each rank, once all have begun."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found: dict[int, int] = {}
        for log in (out / "logs").glob("rank*.log"):
            for rank, pid in STARTED.findall(log.read_text()):
                found[int(rank)] = int(pid)
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise RuntimeError(f"only {found} have started")


@contextlib.contextmanager
def quotas(cores: Sequence[float | None]) -> Iterator[list[Path | None]]:
    """A control group for each rank with a limit."""
    groups: list[Path | None] = []
    for rank, part in enumerate(cores):
        if part is None:
            groups.append(None)
            continue
        group = GROUPS / f"smol-unequal-{os.getpid()}-{rank}"
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(part * PERIOD_US)))
        groups.append(group)
    try:
        yield groups
    finally:
        for made in groups:
            for _ in range(50):
                if made is None:
                    break
                with contextlib.suppress(OSError):
                    made.rmdir()
                    break
                time.sleep(0.1)


def confine(group: Path | None, pid: int) -> None:
    """Put a process with all its threads into a control group."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(pid))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run and all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8)
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
