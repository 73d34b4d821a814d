"""`grove`: the script API without a cluster file. Comes in a later release."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Say that it is not there yet; ends the process with exit code 2."""
    sys.stderr.write("error: grove comes in a later release. Use smolcluster train --local N, or smolcluster node\n")
    sys.exit(2)
