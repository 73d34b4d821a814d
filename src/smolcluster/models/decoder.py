"""A decoder-only transformer that generates: some of its layers, with a cache of keys and values.

Rows of several sequences are computed together: one matrix product for all of them, attention for each by itself. So a
step may hold one new token of each of five streams and a piece of a sixth one's prompt, without padding. Names carry
their shape:

    N rows (tokens of all sequences)   D model   H heads   G heads of keys and values   K head dim   F feed-forward
    L positions of a sequence   V vocab

In float64 every value is computed as transformers computes it, where that is in float32: norms of Llama and rotary
positions. Otherwise as is fastest.

Source    Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971, section 2.2 (Llama); Su et al. 2021,
          arXiv:2104.09864 (rotary positions); Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Yu et al. 2022,
          Orca (OSDI), section 3.2 (rows of several sequences together, attention each by itself)
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolcluster.models.decoder_config import Activation, DecoderConfig
from smolcluster.models.linear import Linear

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


class Segment(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        slot: where its keys and values are kept.
        start: position of the first of these tokens; what is before it has been computed.
        length: how many.
    """

    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight (D,), and bias (D,) if it is a LayerNorm."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one block.

    Attributes:
        qkv: D to (H + 2 G) K: queries, keys, values.
        out: H K to D.
        up: D to F; with a gate to 2 F, the gate first.
        down: F to D.
        q_norm, k_norm: of each head, (K,).
    """

    attention_norm: Norm
    qkv: Linear
    out: Linear
    ff_norm: Norm
    up: Linear
    down: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """Token embedding (V, D), and positions (L, D) if they are learned."""

    tokens: Tensor
    positions: Tensor | None


@dataclass(frozen=True, slots=True)
class Exit:
    """The last norm, and the head, D to V."""

    norm: Norm
    head: Linear


class KeyValueCache:
    """Keys and values of some blocks, for sequences in slots: (blocks, slots, G, L, K) each."""

    def __init__(
        self, config: DecoderConfig, blocks: int, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve it. What nobody has written takes no memory yet on most systems."""
        shape = (blocks, slots, config.kv_heads, length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        # (1, G, L, K) for each block and slot: indexing costs as much as a small product.
        self.at = [
            [(k[None], v[None]) for k, v in zip(ks, vs, strict=True)]
            for ks, vs in zip(self.keys, self.values, strict=True)
        ]


class Decoder:
    """Consecutive layers of a model: entry, blocks, exit, of which a stage may have any run."""

    def __init__(
        self,
        config: DecoderConfig,
        entry: Entry | None,
        blocks: Sequence[tuple[int, Block]],
        exit: Exit | None,
        cache: KeyValueCache,
        dtype: torch.dtype,
        *,
        is_isolated: bool = False,
    ) -> None:
        """Take the weights over.

        Args:
            config: of the whole model.
            entry: if the first layer is here.
            blocks: with their numbers in the model, from 0 on.
            exit: if the last layer is here.
            cache: of these blocks.
            dtype: of activations.
            is_isolated: compute each segment by itself. Slower, but every bit of its rows then depends on its own
                tokens and on how they are cut only, and not on which others are computed with them: libraries add in
                another order where a matrix has more rows.
        """
        self.config = config
        self.entry, self.exit = entry, exit
        self.cache = cache
        self._blocks = list(blocks)
        self._is_isolated = is_isolated
        self._exact = dtype == torch.float64
        self._activation = _ACTIVATIONS[config.activation]
        self._cos, self._sin = _rotations(config, cache.keys.shape[3], dtype, cache.keys.device)

    @property
    def slots(self) -> int:
        """Sequences that are kept at once."""
        return self.cache.keys.shape[1]

    @property
    def length(self) -> int:
        """Positions of each."""
        return self.cache.keys.shape[3]

    @torch.inference_mode()
    def __call__(self, x: Tensor, segments: Sequence[Segment], wanted: Sequence[int] = ()) -> Tensor:
        """Run the layers over rows of several sequences, and keep their keys and values.

        Args:
            x: ids (N,) int64 if the entry is here, else (N, D); rows in the order of the segments.
            segments: whose rows they are. No slot twice.
            wanted: rows whose logits are asked for, if the exit is here.

        Returns:
            (N, D), or logits (len(wanted), V).
        """
        x = x.to(self.cache.keys.device)
        if not self._is_isolated or len(segments) == 1:
            return self._run(x, segments, wanted)
        outs, row = [], 0
        for segment in segments:
            end = row + segment.length
            own = [each - row for each in wanted if row <= each < end]
            if self.exit is None or own:
                outs.append(self._run(x[row:end], [segment], own))
            else:  # nobody wants to know, but its keys and values are kept
                self._run(x[row:end], [segment], [0])
            row = end
        return torch.cat(outs) if outs else x.new_empty((0, self.config.vocab_size))

    def _run(self, x: Tensor, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        positions_N = _positions(segments, x.device)
        if self.entry is not None:
            x = F.embedding(x, self.entry.tokens)
            if self.entry.positions is not None:
                x = x + self.entry.positions[positions_N]
        rotation = None if self._cos is None or self._sin is None else (self._cos[positions_N], self._sin[positions_N])
        masks: dict[tuple[int, int | None], Tensor | None] = {}
        for place, (number, block) in enumerate(self._blocks):
            x = x + self._attend(block, self._norm(block.attention_norm, x), segments, rotation, place, number, masks)
            x = x + self._feed_forward(block, self._norm(block.ff_norm, x))
        if self.exit is None:
            return x
        if not wanted:  # a piece of a prompt
            return x.new_empty((0, self.config.vocab_size))
        rows = x if len(wanted) == x.shape[0] else x[list(wanted)]
        return self.exit.head(self._norm(self.exit.norm, rows))

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        eps = self.config.norm_eps
        if self.config.is_gpt2:
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)
        if self._exact:
            x_32 = x.float()
            return norm.weight * (x_32 * torch.rsqrt(x_32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], norm.weight, eps)

    def _feed_forward(self, block: Block, x_ND: Tensor) -> Tensor:
        up = block.up(x_ND)
        if self.config.is_gpt2:
            return block.down(self._activation(up))
        gate_NF, up_NF = up.chunk(2, dim=-1)
        return block.down(self._activation(gate_NF) * up_NF)

    def _attend(
        self,
        block: Block,
        x_ND: Tensor,
        segments: Sequence[Segment],
        rotation: tuple[Tensor, Tensor] | None,
        place: int,
        number: int,
        masks: dict[tuple[int, int | None], Tensor | None],
    ) -> Tensor:
        config = self.config
        rows, heads, groups = x_ND.shape[0], config.num_heads, config.kv_heads
        q_NHK, k_NGK, v_NGK = torch.split(
            block.qkv(x_ND).view(rows, heads + 2 * groups, config.head_dim), [heads, groups, groups], dim=1
        )
        if block.q_norm is not None and block.k_norm is not None:
            q_NHK, k_NGK = self._norm(block.q_norm, q_NHK), self._norm(block.k_norm, k_NGK)
        if rotation is not None:
            q_NHK, k_NGK = _rotate(q_NHK, rotation), _rotate(k_NGK, rotation)
        window, kept = config.windows[number], self.cache.at[place]
        outs = []
        row = 0
        for index, (slot, start, count) in enumerate(segments):
            keys_1GLK, values_1GLK = kept[slot]
            q, k, v, end = q_NHK, k_NGK, v_NGK, start + count
            if count != rows:
                own = slice(row, row + count)
                q, k, v = q[own], k[own], v[own]
            keys_1GLK[:, :, start:end] = k.transpose(0, 1)
            values_1GLK[:, :, start:end] = v.transpose(0, 1)
            begin = 0 if window is None else max(0, start + 1 - window)
            if (index, window) not in masks:
                masks[index, window] = _mask(start, count, begin, window, x_ND.device)
            outs.append(_attention(q, keys_1GLK[:, :, begin:end], values_1GLK[:, :, begin:end], masks[index, window]))
            row += count
        return block.out(outs[0] if len(outs) == 1 else torch.cat(outs))


def _attention(q_THK: Tensor, keys_1GLK: Tensor, values_1GLK: Tensor, mask_TL: Tensor | None) -> Tensor:
    """(T, H K) of one sequence; a group of H / G heads of queries looks at the same keys."""
    count, heads, width = q_THK.shape
    groups = keys_1GLK.shape[1]
    if count == 1:  # the heads of a group as if they were tokens: no key is read twice
        q_1GHK = q_THK.view(1, groups, heads // groups, width)
        return F.scaled_dot_product_attention(q_1GHK, keys_1GLK, values_1GLK).reshape(1, heads * width)
    if heads != groups:
        keys_1GLK = keys_1GLK[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
        values_1GLK = values_1GLK[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
    out_1HTK = F.scaled_dot_product_attention(q_THK.transpose(0, 1)[None], keys_1GLK, values_1GLK, attn_mask=mask_TL)
    return out_1HTK[0].transpose(0, 1).reshape(count, heads * width)


def _mask(start: int, count: int, begin: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys, from position `begin` on, each of `count` tokens sees: (T, L) of bool; None: one, which sees all."""
    if count == 1:
        return None
    at_T1 = torch.arange(start, start + count, device=device)[:, None]
    keys_L = torch.arange(begin, start + count, device=device)
    mask_TL = keys_L <= at_T1
    return mask_TL if window is None else mask_TL & (keys_L > at_T1 - window)


def _positions(segments: Sequence[Segment], device: torch.device) -> Tensor:
    if all(segment.length == 1 for segment in segments):
        return torch.tensor([segment.start for segment in segments], device=device)
    return torch.cat([torch.arange(start, start + count, device=device) for _, start, count in segments])


def _rotations(
    config: DecoderConfig, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin of every position, (L, 1, K) each."""
    if config.rope is None:
        return None, None
    angles = torch.arange(length)[:, None].float() * config.rope
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _rotate(x_NHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Each half of a head with the other one, as Hugging Face's weights have it."""
    cos, sin = rotation
    first, second = x_NHK.chunk(2, dim=-1)
    return x_NHK * cos + torch.cat([-second, first], dim=-1) * sin
