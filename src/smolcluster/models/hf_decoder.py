"""Layers of any decoder-only model of transformers, computed by its own classes, with keys and values in slots.

What decoder.py does not compute. Each sequence of a step is computed by itself, as transformers knows no rows of
several sequences; so many streams together are no faster than one after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smolcluster.errors import ConfigError
from smolcluster.hub import first_line
from smolcluster.models.decoder import Segment
from smolcluster.models.hf import HFModel
from smolcluster.models.hf_cache import make_slot_cache
from smolcluster.models.hf_layers import run_layers
from smolcluster.models.stage import Layers

# What a model raises that does something else than is asked of it here.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, StopIteration)


class HfDecoder:
    """Consecutive layers of a model: the same interface as decoder.Decoder.

    Attributes:
        slots: sequences that are kept at once.
        length: positions of each.
    """

    def __init__(
        self,
        model: HFModel,
        every: Layers | None,
        layers: range,
        dtype: torch.dtype,
        *,
        blocks: int,
        slots: int,
        length: int,
    ) -> None:
        """Take a model over, and run it once to reserve what it keeps.

        Args:
            model: in evaluation mode, with stand-ins for the layers that are not here (models/stage.py).
            every: all of its layers; None: it cannot be cut, and is here as a whole.
            layers: which are here.
            dtype: of activations.
            blocks: how many the whole model has.
            slots: sequences that are kept at once.
            length: positions of each.

        Raises:
            ConfigError: it does not run like this, or keeps something else than keys and values of each block.
        """
        self.slots, self.length = slots, length
        self._inner: Any = model.inner
        self._every, self._layers = every, layers
        self._is_last = layers.stop == blocks + 2
        self._cache = make_slot_cache(blocks, slots, length)
        self._device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        # Heads of 100,000 tokens and more are not computed for rows whose logits nobody wants.
        self._takes_rows = "logits_to_keep" in inspect.signature(self._inner.forward).parameters
        self._try(dtype, set(range(max(layers.start, 1) - 1, min(layers.stop, blocks + 1) - 1)))

    def _try(self, dtype: torch.dtype, blocks: set[int]) -> None:
        config = self._inner.config.get_text_config()
        x = torch.zeros((1, config.hidden_size), dtype=dtype)
        if self._layers.start == 0:
            x = torch.zeros(1, dtype=torch.int64)
        family = self._inner.config.model_type
        try:
            self(x, [Segment(0, 0, 1)], [0])
        except FAILURES as exc:
            raise ConfigError(f"a {family} does not run with keys and values in slots ({first_line(exc)})") from exc
        check_keeps(family, self._cache, blocks)

    @torch.inference_mode()
    def __call__(self, x: Tensor, segments: Sequence[Segment], wanted: Sequence[int] = ()) -> Tensor:
        """Run the layers over rows of several sequences, and keep their keys and values; see decoder.Decoder."""
        x = x.to(self._device)
        outs, row = [], 0
        for segment in segments:
            end = row + segment.length
            own = [each - row for each in wanted if row <= each < end]
            # The model finds the positions, and the masks, from how much the cache says is there.
            self._cache.begin(segment.slot, segment.start)
            out = self._run(x[row:end][None], own)[0]
            if not self._is_last:
                outs.append(out)
            elif own:
                outs.append(out if self._takes_rows else out[own])
            row = end
        return torch.cat(outs) if outs else x.new_empty((0, self._inner.config.get_text_config().vocab_size))

    def _run(self, x: Tensor, rows: list[int]) -> Tensor:
        options: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self._takes_rows and self._is_last:
            # At least one: some models multiply nothing else.
            options["logits_to_keep"] = torch.tensor(rows or [0], device=x.device)
        if self._every is not None:
            return run_layers(self._inner, self._every, x, self._layers, options)
        logits: Tensor = self._inner(input_ids=x, **options).logits
        return logits


def check_keeps(family: str, cache: Any, blocks: set[int]) -> None:
    """Refuse a model that keeps something else than keys and values of each block, as recurrent layers do.

    Raises:
        ConfigError: since `begin` others than `blocks` have written.
    """
    if cache.written != blocks:
        raise ConfigError(
            f"a {family} cannot be served: {len(cache.written)} of {len(blocks)} blocks keep keys and values of their "
            "own. Name a model with attention in each block"
        )
