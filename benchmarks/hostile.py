"""A million hostile handshakes and frames: no crash, no memory beyond the limits, nothing executed.

    python benchmarks/hostile.py                                   the million
    python benchmarks/hostile.py --cases 20000 --out FILE          a few
    python benchmarks/hostile.py --only "collective frames" --case 8    one case again, with its traceback

Every reader of foreign bytes (tests/hostile/targets.py) runs in this process and gets what somebody hostile would send:
valid bytes with something wrong in them, drawn from a seed. The process may not use more address space than the largest
frame and a margin, and an audit hook hears of everything that imports, opens, compiles, unpickles or starts something.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import psutil

sys.path.pop(0)  # this folder, which has a hostile.py too
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hostile.mutator import EXECUTED
from hostile.targets import Target, targets
from smolcluster.transport.frame import MAX_UNSIZED_BYTES

SEED = 4
WARM_UP = 50  # cases of each reader before anything is watched: what is imported late is imported then
MARGIN_BYTES = 256 << 20
# What is fast gets more.
SHARES = {
    "live listener": 0.01,
    "listener, without token": 0.17,
    "listener, with token": 0.1,
    "dialler, to one without the token": 0.1,
    "dialler, to one with the token": 0.05,
    "shared memory offers": 0.03,
    "control frames, without the key": 0.15,
    "control frames, with the key": 0.1,
    "join and view": 0.05,
    "messages of a run": 0.04,
    "collective frames": 0.1,
    "messages between two ranks": 0.1,
}
FORBIDDEN = (
    "pickle.", "marshal.", "exec", "compile", "import", "open", "os.", "subprocess.", "ctypes.", "code.", "shutil.",
    "tempfile.", "webbrowser.", "urllib.",
)  # fmt: skip


class Watch:
    """Audit events that none of the cases may cause. Python keeps such a hook for ever, so it can be switched off."""

    def __init__(self) -> None:
        self.is_on = False
        self.seen: Counter[str] = Counter()
        self.first = ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event.startswith(FORBIDDEN):
            self.is_on = False
            self.seen[event] += 1
            self.first = self.first or f"{event} {arguments!r}\n{''.join(traceback.format_stack(limit=8))}"
            self.is_on = True


def main() -> int:
    """Run the cases, print and save what came of them; 1 if there was a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--out", type=Path, help="where the figures go; default: benchmarks/results/hostile.json")
    arguments = parser.parse_args()
    faulthandler.enable()
    watch = Watch()
    with targets() as found:
        chosen = [target for target in found if arguments.only in target.name]
        if arguments.case is not None:
            for target in chosen:
                print(target.name, "->", target.attack(dice_of(arguments.seed, target, arguments.case)))
            return 0
        for target in chosen:
            for case in range(WARM_UP):
                target.attack(dice_of(-1, target, case))
        figures = measure(chosen, arguments.cases, arguments.seed, watch)
    print(json.dumps(figures, indent=2))
    if watch.first:
        print(watch.first)
    if arguments.out is None:
        machine.save("hostile", figures)
    else:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if figures["defects"] or figures["forbidden_events"] or EXECUTED else 0


def measure(chosen: list[Target], cases: int, seed: int, watch: Watch) -> dict[str, Any]:
    """Run every target's share of the cases."""
    process = psutil.Process()
    before = process.memory_info()
    limit = limit_address_space(before.vms + MAX_UNSIZED_BYTES + MARGIN_BYTES)
    readers: dict[str, Any] = {}
    defects: list[str] = []
    began = time.perf_counter()
    for target in chosen:
        outcomes: Counter[str] = collections.Counter()
        count = round(cases * SHARES[target.name])
        start = time.perf_counter()
        for case in range(count):
            dice = dice_of(seed, target, case)
            watch.is_on = True
            try:
                outcomes[target.attack(dice)] += 1
            except Exception as error:  # noqa: BLE001 - this is what is looked for
                watch.is_on = False
                outcomes["DEFECT"] += 1
                defects.append(f"--only {target.name!r} --case {case} --seed {seed}: {error!r}"[:500])
            finally:
                watch.is_on = False
        seconds = time.perf_counter() - start
        readers[target.name] = {
            "cases": count,
            "cases_per_s": round(count / seconds),
            "ended": dict(outcomes.most_common(12)),
        }
        print(
            f"{target.name}: {count} cases, {outcomes['DEFECT']} defects, {seconds:.0f} s", file=sys.stderr, flush=True
        )
    return {
        "cases": sum(reader["cases"] for reader in readers.values()),
        "seed": seed,
        "defects": len(defects),
        "first_defects": defects[:20],
        "executed": len(EXECUTED),
        "forbidden_events": dict(watch.seen),
        "wall_s": round(time.perf_counter() - began),
        "resident_growth_bytes": process.memory_info().rss - before.rss,
        "address_space_limit_bytes": limit,
        "address_space_before_bytes": before.vms,
        "largest_frame_bytes": MAX_UNSIZED_BYTES,
        "readers": readers,
    }


def dice_of(seed: int, target: Target, case: int) -> random.Random:
    """Draws for one case, the same whatever ran before."""
    return random.Random(f"{seed}/{target.name}/{case}")


def limit_address_space(nbytes: int) -> int | None:
    """Allocating more fails from now on; None: this system has no such limit."""
    if sys.platform != "linux":
        return None
    import resource

    ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX: else each thread reserves 64 MiB of addresses that nobody uses
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    return nbytes


if __name__ == "__main__":
    sys.exit(main())
