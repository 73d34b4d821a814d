"""For all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _denormals_are_numbers_again() -> Iterator[None]:
    """Ranks flush denormals to zero, and a test that plays a rank leaves that behind in its thread."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
