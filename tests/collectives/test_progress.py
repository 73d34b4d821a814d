"""Who drives the loop: interleavings of threads that other tests meet too seldom, made to happen."""

from __future__ import annotations

import threading

import pytest

from smolcluster.collectives import progress
from smolcluster.collectives.progress import ProgressLoop
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import SmolError
from transport.leaks import no_leftovers

WAIT = 10.0  # for what ought to happen


class LateWaiter(threading.Condition):
    """The loop's condition. A thread that waits for the loop gets the lock back only once the background thread sleeps.

    Attributes:
        waits: a thread waits for the loop.
        sleeps: the background thread has looked around since, and sleeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()
        self.sleeps = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread().name.startswith("progress"):
            self.sleeps.set()  # whoever sees it still has to get the lock, which is held until the thread does sleep
            return super().wait(timeout)
        self.sleeps.clear()
        self.waits.set()
        woken = super().wait(timeout)
        self.release()
        assert self.sleeps.wait(WAIT)
        self.acquire()
        return woken


class Loop(ProgressLoop):
    """A loop without lanes whose background thread begins when `begins` is set.

    Attributes:
        drives: the background thread drives the loop, or has done so since this was cleared.
    """

    def __init__(self) -> None:
        self.begins = threading.Event()
        self.drives = threading.Event()
        super().__init__("test", on_broken=lambda peer, error: self.fail(error))
        self._state: threading.Condition = LateWaiter()
        self.begins.set()

    def _run(self) -> None:
        assert self.begins.wait(WAIT)
        super()._run()

    def _drive(self, finished: threading.Event | None, deadline: float | None, *, once: bool = False) -> None:
        if threading.current_thread() is self._thread:
            self.drives.set()
        super()._drive(finished, deadline, once=once)


def test_a_waiter_that_leaves_without_driving_gives_the_loop_back_to_the_background_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The background thread leaves the loop to whoever waits; the waiter finds its work done and goes.

    Between the two the background thread looks whether it is needed, while it still seems that somebody waits. Who goes
    must wake it then: other messages are under way, and nobody waits for those.
    """
    monkeypatch.setattr(progress, "MAX_SLEEP", WAIT)  # nothing is overlooked for less than that
    with no_leftovers():
        loop = Loop()
        condition = loop._state
        assert isinstance(condition, LateWaiter)

        def work(name: str) -> PendingWork:
            return PendingWork(loop, lambda: name, [])

        waited_for, under_way = work("waited for"), work("under way")
        begun = threading.Event()

        def finish_once_somebody_waits() -> None:
            begun.set()
            assert condition.waits.wait(WAIT)
            loop.drives.clear()
            loop.finish(waited_for)

        try:
            loop.submit(under_way, lambda: None)
            assert loop.drives.wait(WAIT)
            loop.submit(waited_for, finish_once_somebody_waits)
            assert begun.wait(WAIT)  # on the background thread: nobody else drives
            waited_for.wait(WAIT)
            assert condition.sleeps.is_set()
            assert loop.drives.wait(WAIT), "nobody drives the loop"
            assert not under_way.done()
        finally:
            loop.close()
        with pytest.raises(SmolError, match="closed while this was under way"):
            under_way.wait(WAIT)
