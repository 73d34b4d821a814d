"""Keys and values of sequences in slots, for the models of transformers: what they write, by position.

Their own caches grow at the end and, where a layer has a window, forget at the beginning. Here a sequence goes on from
any position: what was kept from there on is written over. Everything is kept; a model's masks say what a token sees.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from smolcluster.hub import import_extra


class BlockCache:
    """Keys and values of one block: (slots, heads, length, width) each, reserved when the first ones come.

    What nobody has written takes no memory yet on most systems.
    """

    # What transformers asks of a layer of its caches: all positions are there, and nothing is compiled.
    is_sliding = False
    is_compileable = False

    def __init__(self, slots: int, length: int) -> None:
        """Reserve nothing yet: only the model knows how wide its keys are."""
        self._slots, self._length = slots, length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, slot: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep some positions of a sequence.

        Args:
            slot: the sequence's.
            start: the first one's position.
            keys: (1, heads, T, width).
            values: the same; their width may be another.

        Returns:
            Keys and values of all positions to the last of these.
        """
        if self.keys is None or self.values is None:
            self.keys, self.values = self._reserve(keys), self._reserve(values)
        end = start + keys.shape[-2]
        self.keys[slot, :, start:end] = keys[0]
        self.values[slot, :, start:end] = values[0]
        return self.keys[slot : slot + 1, :, :end], self.values[slot : slot + 1, :, :end]

    def _reserve(self, like: Tensor) -> Tensor:
        return like.new_empty((self._slots, like.shape[1], self._length, like.shape[3]))


def make_slot_cache(blocks: int, slots: int, length: int) -> Any:
    """A cache of transformers for a whole model; the blocks that are not run take no memory.

    Call its `begin` before each run of the model. `written` are the numbers of the blocks that wrote into it since.

    Args:
        blocks: how many the model has.
        slots: sequences that are kept at once.
        length: positions of each.

    Raises:
        ConfigError: the extra hf is not installed.
    """
    return _slot_cache_class()([BlockCache(slots, length) for _ in range(blocks)])


@functools.cache
def _slot_cache_class() -> Any:
    # Some models take nothing but a subclass of it.
    base = import_extra("transformers", "this model").Cache

    class SlotCache(base):  # type: ignore[misc, valid-type]  # known at run time only
        """One slot at a time: the one that `begin` names."""

        def __init__(self, layers: list[BlockCache]) -> None:
            super().__init__(layers=layers)
            self.begin(0, 0)

        def begin(self, slot: int, start: int) -> None:
            """The next positions are those of `slot` from `start` on."""
            self._slot, self._start = slot, start
            self.written: set[int] = set()
            self._ends = [start] * len(self.layers)

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self.written.add(layer_idx)
            self._ends[layer_idx] = self._start + key_states.shape[-2]
            kept: BlockCache = self.layers[layer_idx]
            return kept.write(self._slot, self._start, key_states, value_states)

        def get_seq_length(self, layer_idx: int | None = 0) -> int:
            return self._ends[layer_idx or 0]

        def get_query_offset(self, layer_idx: int | None = 0) -> int:
            return self.get_seq_length(layer_idx)

        def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
            # transformers 4 gives the positions themselves.
            count = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
            return self.get_seq_length(layer_idx) + count, 0

    return SlotCache
