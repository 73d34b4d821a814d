"""The process that speaks to Weights & Biases, so that a run never waits for it and never runs its code.

wandb starts a service of its own, hooks the interpreter's exit and waits for the network there. All that stays in here,
where it can be killed. wandb_runs.py starts this module and writes JSON lines to its stdin; the lines of its stdout are
notes for the user. An end-of-file means that the run's process is gone: then this one leaves at once, with the service.

To this process  {"rank_names": […], "mode": …, …}   {"rank": …, "step": …, "point": {…}}   {"exit_code": …, …}
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO
from urllib.parse import urlsplit

import psutil

if TYPE_CHECKING:
    import wandb

# Points that wait for wandb. At a point per rank and second this is minutes; more would only be memory.
MAX_WAITING = 4096
# How long the first connection may take. Who is slower is no place to send metrics to while training goes on.
PROBE_S = 2.0
# How long the server may take to accept a run.
_INIT_S = 5.0
# What is written to the disk at the latest after so many seconds survives a kill.
_FLUSH_S = 1.0
_STDIN, _STDOUT, _STDERR = 0, 1, 2


class DroppingQueue:
    """A queue that loses its oldest entry rather than making anybody wait."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._entries: deque[str] = deque()
        self._limit = limit
        self._changed = threading.Condition()
        self.dropped = 0

    def put(self, entry: str) -> None:
        """Add an entry; never blocks."""
        with self._changed:
            if len(self._entries) >= self._limit:
                self._entries.popleft()
                self.dropped += 1
            self._entries.append(entry)
            self._changed.notify()

    def get(self) -> str:
        """The oldest entry; blocks until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries)
            return self._entries.popleft()


def end_descendants(pid: int) -> None:
    """Kill all that process `pid` has started, and what these have."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()


def main() -> None:
    """Take orders from stdin; ends the process."""
    with (
        os.fdopen(os.dup(_STDIN), encoding="utf-8") as orders,
        os.fdopen(os.dup(_STDOUT), "w", 1, encoding="utf-8") as notes,
    ):
        os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)  # wandb finds nobody to ask
        os.dup2(_STDERR, _STDOUT)
        start = json.loads(orders.readline())
        queue = DroppingQueue()
        threading.Thread(target=_read, args=(orders, queue), name="orders", daemon=True).start()
        try:
            code = _serve(start, queue, lambda text: print(f"W&B: {text}", file=notes))
        except Exception as error:  # noqa: BLE001 - whatever wandb raises: training goes on without it
            traceback.print_exc()
            print(f"W&B: it stopped ({_first_line(error)}). metrics.jsonl holds everything", file=notes)
            code = 1
        _leave(code)


def _read(orders: TextIO, queue: DroppingQueue) -> None:
    for line in orders:
        queue.put(line)
    _leave(1)


def _leave(code: int) -> NoReturn:
    end_descendants(os.getpid())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # without wandb's hooks, which wait for the network


def _serve(start: dict[str, Any], queue: DroppingQueue, note: Callable[[str], None]) -> int:
    import wandb

    runs = _open_runs(start, note)
    while "exit_code" not in (order := json.loads(queue.get())):
        runs[order["rank"]].log(order["point"], step=order["step"])
    if queue.dropped:
        note(f"it was too slow: {queue.dropped} points are missing there. metrics.jsonl holds them")
    for run, summary in zip(runs, order["summaries"], strict=True):
        run.summary.update(summary)
        run.finish(exit_code=order["exit_code"])
    wandb.teardown()
    return 0


def _open_runs(start: dict[str, Any], note: Callable[[str], None]) -> list[wandb.Run]:
    """One run per rank. Offline after the first thing that stands in the way of online."""
    import wandb

    mode, obstacle = start["mode"], None
    if mode == "online":
        obstacle = _unreachable(wandb.setup().settings)
    runs = []
    for name in start["rank_names"]:
        run = None
        if mode == "online" and obstacle is None:
            try:
                run = _open_run(start, name, "online")
            except Exception as error:  # noqa: BLE001 - no key, a wrong one, a server that does not answer, …
                traceback.print_exc()
                obstacle = _first_line(error)
        runs.append(run or _open_run(start, name, "offline"))
    if obstacle is not None:
        folder = Path(start["folder"], "wandb")
        note(f"offline: {obstacle}. Upload the run later: wandb sync {folder / 'offline-run-*'}")
    elif mode == "online":
        note(f"online, at {runs[0].url}")
    return runs


def _open_run(start: dict[str, Any], name: str, mode: Literal["online", "offline"]) -> wandb.Run:
    import wandb

    settings = {
        "init_timeout": _INIT_S,
        "silent": True,
        "console": "off",
        "symlink": False,
        "label_disable": True,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "save_code": False,
        # What wandb would measure is this process, on this machine; the ranks measure themselves: sys/….
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": _FLUSH_S,
    }
    known = wandb.Settings.model_fields
    return wandb.init(
        project=start["project"],
        group=start["group"],
        name=name,
        job_type="train",
        config=start["config"],
        dir=start["folder"],
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
    )


def _unreachable(settings: wandb.Settings) -> str | None:
    """In words, if nobody answers at the server's address, or at the proxy on the way, within PROBE_S."""
    server = urlsplit(settings.base_url)
    host = server.hostname or ""
    proxy = None
    if not urllib.request.proxy_bypass(host):
        proxy = getattr(settings, f"{server.scheme}_proxy", None) or urllib.request.getproxies().get(server.scheme)
    target = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}" if proxy else settings.base_url)
    port = target.port or (443 if target.scheme == "https" else 80)
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), PROBE_S):
            answered.set()
        done.set()

    # On a thread: looking a name up has no timeout of its own, and without a network takes long.
    done = threading.Event()
    threading.Thread(target=connect, name="probe", daemon=True).start()
    done.wait(PROBE_S)
    return None if answered.is_set() else f"{target.hostname} cannot be reached"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if text in ("", "<no message>"):  # what wandb says of a key that the server does not know
        return f"the server refused the run ({type(error).__name__})"
    return text.splitlines()[0].rstrip(".")[:200]


if __name__ == "__main__":
    main()
