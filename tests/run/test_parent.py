"""A rank's side of its lifeline, in a process of its own; no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

SOURCE = str(Path(__file__).parent.parent.parent / "src")
SCRIPT = """
import os
from smolcluster.run.parent import ParentLink
link = ParentLink()
link.tell({"event": "row"})
link.deliver()
link.tell({"event": "delivered"})
os._exit(0)
"""


def test_a_rank_waits_until_its_parent_has_written_the_rows() -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE},
        text=True,
    )
    assert rank.stdin is not None
    assert rank.stdout is not None
    with rank:
        assert [json.loads(rank.stdout.readline())["event"] for _ in range(2)] == ["row", "rows_end"]
        rank.stdin.write('{"command": "rows_written"}\n')
        rank.stdin.flush()
        assert json.loads(rank.stdout.readline()) == {"event": "delivered"}
        assert rank.wait() == 0


def test_a_rank_that_waits_for_a_parent_that_is_gone_ends() -> None:
    rank = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
        text=True,
        timeout=20,
    )
    assert rank.returncode == 3
    assert "delivered" not in rank.stdout
