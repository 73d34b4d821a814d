"""A supervising process for tests that signal it: fake_parent.py RANK_SCRIPT WORD,WORD WORD,…   prints what it sees."""

import json
import sys
import tempfile
from pathlib import Path

from smolcluster.run.supervisor import ChildSpec, Supervisor


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        specs = [
            ChildSpec(
                rank, [sys.executable, sys.argv[1]], {"script": words.split(",")}, Path(folder, f"rank{rank}.log")
            )
            for rank, words in enumerate(sys.argv[2:])
        ]
        supervisor = Supervisor(
            specs,
            lambda rank, message: print(json.dumps({"rank": rank, **message}), flush=True),
            patience=5,
            on_stop=lambda: print(json.dumps({"event": "stopping"}), flush=True),
        )
        outcome = supervisor.run()
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
