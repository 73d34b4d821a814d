"""The stages of a served model as processes of this machine: started, fed their bootstrap, ended with this one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

from smolcluster.errors import ServingError
from smolcluster.run.local import child_environment
from smolcluster.run.stage import StageBootstrap

TICK = 0.05
# For a stage to end by itself when its standard input is closed.
END_SECONDS = 5.0


class StageProcesses:
    """Processes that end when their standard input does."""

    def __init__(self, stages: Iterable[StageBootstrap]) -> None:
        """Start one for each stage."""
        self.processes: list[subprocess.Popen[bytes]] = []
        for bootstrap in stages:
            if bootstrap.log is not None:
                bootstrap.log.parent.mkdir(parents=True, exist_ok=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "smolcluster.run.stage"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # Ctrl-C is for this process, which lets them end when nothing is under way.
                start_new_session=True,
                env={**os.environ, **child_environment()},
            )
            assert process.stdin is not None
            self.processes.append(process)
            process.stdin.write(json.dumps(bootstrap.model_dump(mode="json")).encode() + b"\n")
            process.stdin.flush()

    def wait_for(self, is_there: Callable[[], bool], seconds: float) -> None:
        """Block until something is so.

        Raises:
            ServingError: a process has ended, or it is not so in time.
        """
        deadline = time.monotonic() + seconds
        while not is_there():
            for number, process in enumerate(self.processes, start=1):
                if process.poll() is not None:
                    raise ServingError(f"stage {number} has ended with exit code {process.returncode}; see above")
            if time.monotonic() >= deadline:
                raise ServingError(f"the stages have not come within {seconds:g} s")
            time.sleep(TICK)

    def close(self) -> None:
        """End them all; blocks."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
