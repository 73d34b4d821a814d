"""Places for sequences whose keys and values are kept, also when they have ended (prefix cache).

The next turn of a conversation begins with the same tokens, and need not compute them again.
"""

from __future__ import annotations

from collections.abc import Sequence

# Fewer tokens in common are computed again rather than another conversation's thrown away.
LEAST_REUSED = 16


class Slots:
    """Who has which slot, and what lies in those that are free."""

    def __init__(self, number: int) -> None:
        """All are free and empty."""
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(number)}  # free ones, longest unused first
        self._number = number

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._kept)

    @property
    def used(self) -> int:
        """How many are not."""
        return self._number - len(self._kept)

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many of a sequence's first tokens lie in a free slot; 0: too few to matter."""
        most = max((_common(kept, tokens) for kept in self._kept.values()), default=0)
        return most if most >= LEAST_REUSED else 0

    def acquire(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Take a slot for a sequence.

        Args:
            tokens: its tokens so far, at least one.

        Returns:
            The slot, and how many of the tokens are there already; never all, as the last one gives the next.

        Raises:
            KeyError: none is free.
        """
        reused, best = max(
            ((_common(kept, tokens), slot) for slot, kept in self._kept.items()),
            key=lambda found: found[0],
            default=(0, -1),
        )
        if reused < LEAST_REUSED:
            reused, best = 0, min(self._kept, key=lambda slot: len(self._kept[slot]) > 0, default=-1)
        del self._kept[best]
        return best, reused

    def release(self, slot: int, tokens: Sequence[int]) -> None:
        """Give it back; keys and values of `tokens` are in it."""
        self._kept[slot] = list(tokens)

    def forget(self) -> None:
        """Nothing lies in the free ones any more."""
        for slot in self._kept:
            self._kept[slot] = []


def _common(kept: Sequence[int], tokens: Sequence[int]) -> int:
    limit = min(len(kept), len(tokens) - 1)
    return next((n for n in range(limit) if kept[n] != tokens[n]), limit)
