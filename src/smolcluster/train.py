"""`python -m smolcluster.train` and `python src/smolcluster/train.py`: the same as `smolcluster train`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run `smolcluster train` with this process's arguments; ends the process."""
    package = Path(__file__).resolve().parent
    if not __package__:
        # Run as a file: Python put this folder first on the path, where our log.py or config/ would pass for packages
        # of their own, and the folder above, where smolcluster is, may not be there at all.
        others = [entry for entry in sys.path if Path(entry or ".").resolve() != package]
        sys.path[:] = [str(package.parent), *others]

    from smolcluster.cli import main as run_command

    run_command(["train", *sys.argv[1:]], prog_name="python -m smolcluster.train" if __package__ else "train.py")


if __name__ == "__main__":
    main()
