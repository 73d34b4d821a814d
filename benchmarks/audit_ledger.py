"""Does every sample count exactly once? Reads a run's ledger and nothing else; imports nothing of smolcluster.

    python benchmarks/audit_ledger.py RUN --samples 60000 --epochs 2

A line of RUN/ledger.jsonl is a lease whose gradient is in the weights:

    {"step": 12, "lease": 31, "rank": 2, "session": 2, "ranges": [[0, 640, 672]], "samples": 32}

A range is (epoch, first place, place behind the last). Every place of every epoch must stand in the file once, and no
lease twice. Exits 0 if that is so, else 1 with what is missing or double.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Of each sort of problem so many are printed; the rest is counted.
SHOWN = 10


def audit(path: Path, samples: int, epochs: int) -> list[str]:
    """What is wrong with a ledger; empty: nothing.

    Args:
        path: the run folder, or the file itself.
        samples: places of an epoch.
        epochs: of the whole run.
    """
    path = Path(path)
    path = path / "ledger.jsonl" if path.is_dir() else path
    if not path.is_file():
        return [f"there is no file {path.name}"]
    counts = [bytearray(samples) for _ in range(epochs)]
    leases: dict[int, int] = {}
    problems: list[str] = []
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        problems.append("the last line is not whole")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            lease, claimed = int(row["lease"]), int(row["samples"])
            ranges = [tuple(map(int, part)) for part in row["ranges"]]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number} is no entry: {type(error).__name__} {error}")
            continue
        if lease in leases:
            problems.append(f"lease {lease} is committed in line {leases[lease]} and in line {number}")
        leases[lease] = number
        problems += _count(counts, ranges, claimed, f"line {number} (lease {lease})", samples)
    missing = [(epoch, place) for epoch, seen in enumerate(counts) for place in range(samples) if seen[place] == 0]
    double = [(epoch, place) for epoch, seen in enumerate(counts) for place in range(samples) if seen[place] > 1]
    return problems + _told("missing", missing) + _told("double", double)


def _count(counts: list[bytearray], ranges: list[tuple[int, ...]], claimed: int, where: str, samples: int) -> list[str]:
    """Count the places of one lease; what is wrong with it."""
    problems, held = [], 0
    for part in ranges:
        if len(part) != 3 or not (0 <= part[0] < len(counts) and 0 <= part[1] < part[2] <= samples):
            problems.append(f"{where} has the range {list(part)}, which the run does not have")
            continue
        epoch, start, stop = part
        held += stop - start
        seen = counts[epoch]
        for place in range(start, stop):
            seen[place] = min(seen[place] + 1, 255)
    if held != claimed:
        problems.append(f"{where} says {claimed} samples and holds {held}")
    return problems


def _told(what: str, places: list[tuple[int, int]]) -> list[str]:
    """Places as ranges, the first few of them."""
    ranges: list[list[int]] = []
    for epoch, place in places:
        if ranges and ranges[-1][0] == epoch and ranges[-1][2] == place:
            ranges[-1][2] = place + 1
        else:
            ranges.append([epoch, place, place + 1])
    told = [f"{what}: epoch {epoch}, places {start} to {stop - 1}" for epoch, start, stop in ranges[:SHOWN]]
    if len(ranges) > SHOWN:
        told.append(f"{what}: {len(ranges) - SHOWN} more ranges; {len(places)} places in all")
    return told


def main() -> None:
    """Print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--samples", type=int, required=True, help="training samples of an epoch")
    parser.add_argument("--epochs", type=int, required=True)
    arguments = parser.parse_args()
    problems = audit(arguments.run, arguments.samples, arguments.epochs)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"every one of {arguments.samples} samples counts once in each of {arguments.epochs} epochs")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
