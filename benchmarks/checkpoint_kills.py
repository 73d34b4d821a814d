"""SIGKILL at random moments of saving and pruning: the newest whole checkpoint always loads. And what a save costs.

    python benchmarks/checkpoint_kills.py                                    100 kills, and the time of 200 MB
    python benchmarks/checkpoint_kills.py --kills 10 --out FILE              only kills: what the test suite runs

Each process is a fork of this one, so that torch is imported once. It saves and prunes without a pause, and says when
a save has returned. After the kill the newest whole checkpoint must be that one or the next, with all its values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import save

from smolcluster.checkpoint import disk, store
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import newest_whole, open_checkpoint, prune, save_checkpoint

ELEMENTS = 250_000  # 1 MB a tensor: writing, hashing and syncing take their share of the time, and so do renames
KEEP = 2


def save_step(folder: Path, step: int) -> None:
    """A checkpoint of two ranks whose values tell its step, and only the newest kept."""
    values = torch.full((ELEMENTS,), float(step))
    mine = {"model/w": Shard(values, "param"), "optim/w": Shard(values + 0.5, "optim")}
    save_checkpoint(folder, step, mine, {"step": step}, [(1, {"residual/1": Shard(values + 0.25, "residual")})])
    prune(folder, KEEP)


def verify(folder: Path) -> int:
    """The step of the newest whole checkpoint, of which every value was looked at."""
    path, skipped = newest_whole(folder)
    assert not skipped, skipped
    checkpoint = open_checkpoint(path)
    for name, offset in (("model/w", 0.0), ("optim/w", 0.5), ("residual/1", 0.25)):
        assert torch.equal(checkpoint.read(name), torch.full((ELEMENTS,), checkpoint.step + offset)), name
    return checkpoint.step


def kill_while_saving(folder: Path, delay: float) -> tuple[int, str]:
    """Let a process save for `delay` seconds, kill it; the last step it has saved, and what it was doing."""
    before = verify(folder)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for step in range(before + 1, before + 1000):
                save_step(folder, step)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "it failed before it was killed"
    returned = b""
    while piece := os.read(reading, 4096):
        returned += piece
    os.close(reading)
    return before + len(returned), doing(folder)


def doing(folder: Path) -> str:
    """What the traces that a kill left behind tell."""
    names = os.listdir(folder)
    unfinished = [name.removeprefix("writing-") for name in names if name.startswith("writing-")]
    if any(name.startswith("removed-") for name in unfinished):
        return "pruning"
    if any(name.startswith("step_") for name in unfinished):
        written = {path.name for path in folder.glob("writing-step_*/*")}
        return "syncing or renaming" if "index.json" in written else "writing tensors"
    return "pointing latest" if unfinished else "between"


def measure_kills(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """`kills` processes killed at random moments; raises if one of them left less than it should."""
    dice = random.Random(seed)
    began = time.perf_counter()
    for step in (1, 2, 3):
        save_step(folder, step)
    save_s = (time.perf_counter() - began) / 3
    moments: Counter[str] = Counter()
    new = 0
    for _ in range(kills):
        saved, moment = kill_while_saving(folder, dice.uniform(0, 4 * save_s))
        found = verify(folder)
        assert found in (saved, saved + 1), f"step {found} is the newest whole one after step {saved} was saved"
        moments[moment] += 1
        new += found > saved
    return {
        "kills": kills,
        "whole_after_kill": kills,  # else this line is not reached
        "newest_was_the_one_being_written": new,
        "killed_while": dict(moments.most_common()),
        "one_save_s": round(save_s, 4),
        "seed": seed,
    }


def measure_save(folder: Path, mebibytes: int, runs: int) -> dict[str, Any]:
    """Seconds of a save and an open, in fp32 tensors of 4 MiB, and the save's parts."""
    tensors = {f"model/{number}": Shard(torch.rand(2**20), "param") for number in range(mebibytes // 4)}
    rows = []
    for step in range(runs):
        spent: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            for owner, name in (
                (disk, "write_tensors"),
                (store, "sha256_of"),
                (disk, "sync_file"),
                (disk, "sync_folder"),
            ):
                stack.enter_context(timed(owner, name, spent))
            began = time.perf_counter()
            path = save_checkpoint(folder, step, tensors, {})
            spent["save"] = time.perf_counter() - began
        began = time.perf_counter()
        open_checkpoint(path)
        spent["open"] = time.perf_counter() - began
        rows.append({name: round(seconds, 3) for name, seconds in spent.items()})
        prune(folder, 1)
    return {
        "mebibytes": mebibytes,
        "save_s_median": statistics.median(row["save"] for row in rows),
        "open_s_median": statistics.median(row["open"] for row in rows),
        "runs": rows,
    }


@contextlib.contextmanager
def timed(owner: Any, name: str, spent: Counter[str]) -> Iterator[None]:
    """Add the seconds of every call of owner.name to `spent`."""
    real: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*arguments)
        finally:
            spent[name] += time.perf_counter() - began  # type: ignore[assignment]  # a Counter of seconds

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures there, and measure kills only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork has only the thread that called it
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # not where a system keeps files in memory
        figures = measure_kills(Path(name, "kills"), arguments.kills, arguments.seed)
        if arguments.out is None:
            figures["save"] = measure_save(Path(name, "save"), 200, 5)
    print(json.dumps(figures, indent=2))
    if arguments.out is None:
        save("checkpoint_kills", figures)
    else:
        arguments.out.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
