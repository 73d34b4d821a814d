"""The handle of an operation under way, finished by whichever thread drives the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from smolcluster.collectives.base import Work
from smolcluster.errors import CollectiveTimeout, SmolError


class Driver(Protocol):
    """Something that makes progress while its caller waits."""

    def wait(self, finished: threading.Event, timeout: float | None) -> None:
        """Make progress until `finished` is set or `timeout` seconds have passed."""
        ...


class PendingWork:
    """See collectives.base.Work. Finished by the thread that drives the loop."""

    def __init__(self, driver: Driver | None, describe: Callable[[], str], results: list[Tensor]) -> None:
        self.call_id: tuple[str, int] | None = None
        self._driver = driver
        self._describe = describe
        self._results = results
        self._finished = threading.Event()
        self._error: SmolError | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Work], None]] = []

    def wait(self, timeout: float | None = None) -> None:
        if not self._finished.is_set() and self._driver is not None:
            self._driver.wait(self._finished, timeout)
        if not self._finished.is_set():
            raise CollectiveTimeout(f"{self._describe()} was not finished after {timeout:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        return self._finished.is_set()

    def exception(self) -> SmolError | None:
        return self._error

    def result(self) -> list[Tensor]:
        self.wait()
        return self._results

    def add_done_callback(self, fn: Callable[[Work], None]) -> None:
        with self._lock:
            if not self._finished.is_set():
                self._callbacks.append(fn)
                return
        fn(self)

    def finish(self, error: SmolError | None = None, results: list[Tensor] | None = None) -> None:
        """Mark done or failed; the first call counts. Raises what a callback raised, after all were called."""
        with self._lock:
            if self._finished.is_set():
                return
            self._error = error
            if results is not None:
                self._results = results
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        mistake: Exception | None = None
        for fn in callbacks:
            try:
                fn(self)
            except Exception as exc:  # noqa: BLE001 - raised below: the other callbacks must hear of the end as well
                mistake = mistake or exc
        if mistake is not None:
            raise mistake
