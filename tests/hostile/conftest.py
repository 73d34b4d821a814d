"""Every test here closes what it opens, and nothing it sends is ever executed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostile.mutator import EXECUTED
from transport.leaks import no_leftovers


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    """Fails a test that leaves a thread or a socket behind, or that made somebody unpickle."""
    with no_leftovers():
        yield
    assert not EXECUTED
