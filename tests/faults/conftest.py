"""Every test here closes what it opens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from transport.leaks import no_leftovers


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    """Fails a test that leaves a thread or a socket behind."""
    with no_leftovers():
        yield
