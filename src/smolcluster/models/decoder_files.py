"""Loads the layers of a decoder from a Hugging Face folder: those of a stage, and nothing of the rest."""

# ruff: noqa: N806 - shape suffixes are capitals

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from smolcluster.models.decoder import Block, Decoder, Entry, Exit, KeyValueCache, Norm
from smolcluster.models.decoder_config import DecoderConfig
from smolcluster.models.linear import Linear, Rows, WeightKind, make_linear, stays
from smolcluster.models.split import LayerCost
from smolcluster.models.tensor_files import TensorFiles


class DecoderLoader:
    """Reads layers, and keeps those that it was asked for last."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        kind: WeightKind = "plain",
        device: torch.device | str = "cpu",
        *,
        is_isolated: bool = False,
    ) -> None:
        """Args:
        config: what the folder describes.
        dtype: of weights and activations.
        kind: what the matrices are kept as.
        device: where everything is to lie.
        is_isolated: see Decoder.
        """
        self._is_isolated = is_isolated
        self._config, self._dtype, self._kind, self._device = config, dtype, kind, torch.device(device)
        self._base = ""
        self._scratch = torch.empty(0)
        self._kept: dict[int, Entry | Block | Exit] = {}

    @property
    def layers(self) -> int:
        """How many there are, entry and exit included."""
        return self._config.num_layers + 2

    def costs(self) -> list[LayerCost]:
        """Of each layer: what a token takes, and what has to be held; by sizes alone."""
        config = self._config
        width, ff = config.model_dim, config.ff_dim * (1 if config.is_gpt2 else 2)
        attention = (config.num_heads + 2 * config.kv_heads) * config.head_dim + config.num_heads * config.head_dim
        block = width * (attention + ff + config.ff_dim)
        embedding = config.vocab_size * width
        return [
            LayerCost(1.0, embedding + (config.max_positions * width if config.is_gpt2 else 0)),
            *[LayerCost(block, block)] * config.num_layers,
            LayerCost(embedding, embedding),
        ]

    def bytes_per_position(self) -> int:
        """Of keys and values, of one position of a sequence, in all blocks."""
        config = self._config
        return 2 * config.num_layers * config.kv_heads * config.head_dim * self._dtype.itemsize

    def load(self, files: TensorFiles, layers: range, *, slots: int, length: int) -> Decoder:
        """Some layers, with an empty cache; blocks while it reads those that are not there yet.

        Args:
            files: of the model's folder.
            layers: 0 is the entry, 1 to n are the blocks, n + 1 is the exit; see models/stage.py.
            slots: sequences that are kept at once.
            length: positions of each.

        Raises:
            CheckpointError: a tensor is missing or damaged.
        """
        config, self._files = self._config, files
        base = "transformer." if config.is_gpt2 else "model."
        # A folder may be that of the model inside the language model.
        self._base = base if any(name.startswith(base) for name in files.tensors) else ""
        self._kept = {layer: self._kept[layer] for layer in layers if layer in self._kept}
        # The exit before the blocks: what its matrix needs besides while it is rounded is needed when little is there.
        for layer in sorted(layers, key=lambda layer: (0 < layer <= config.num_layers, layer)):
            if layer not in self._kept:
                self._kept[layer] = self._layer(layer)
        self._scratch = torch.empty(0)
        found = [self._kept[layer] for layer in layers]
        blocks = [(layer - 1, part) for layer, part in zip(layers, found, strict=True) if isinstance(part, Block)]
        return Decoder(
            config,
            next((part for part in found if isinstance(part, Entry)), None),
            blocks,
            next((part for part in found if isinstance(part, Exit)), None),
            KeyValueCache(config, len(blocks), slots, length, self._dtype, self._device),
            self._dtype,
            is_isolated=self._is_isolated,
        )

    def _layer(self, layer: int) -> Entry | Block | Exit:
        if layer == 0:
            return self._entry()
        return self._exit() if layer == self._config.num_layers + 1 else self._block(layer - 1)

    def _entry(self) -> Entry:
        if self._config.is_gpt2:
            return Entry(self._tensor("wte.weight"), self._tensor("wpe.weight"))
        return Entry(self._tensor("embed_tokens.weight"), None)

    def _exit(self) -> Exit:
        norm = self._norm("ln_f" if self._config.is_gpt2 else "norm")
        tied = "wte.weight" if self._config.is_gpt2 else "embed_tokens.weight"
        entry = self._kept.get(0)
        head: Tensor | Rows
        if self._config.is_tied and isinstance(entry, Entry):  # not read and kept twice
            head = entry.tokens
        else:
            head = self._weight([self._base + tied if self._config.is_tied else "lm_head.weight"])
        return Exit(norm, make_linear(head, None, self._kind))

    def _block(self, number: int) -> Block:
        if self._config.is_gpt2:
            at = f"h.{number}"
            return Block(
                attention_norm=self._norm(f"{at}.ln_1"),
                qkv=self._linear([f"{at}.attn.c_attn"], has_bias=True, is_transposed=True),
                out=self._linear([f"{at}.attn.c_proj"], has_bias=True, is_transposed=True),
                ff_norm=self._norm(f"{at}.ln_2"),
                up=self._linear([f"{at}.mlp.c_fc"], has_bias=True, is_transposed=True),
                down=self._linear([f"{at}.mlp.c_proj"], has_bias=True, is_transposed=True),
            )
        at = f"layers.{number}"
        config = self._config
        return Block(
            attention_norm=self._norm(f"{at}.input_layernorm"),
            qkv=self._linear([f"{at}.self_attn.{part}_proj" for part in "qkv"], has_bias=config.has_qkv_bias),
            out=self._linear([f"{at}.self_attn.o_proj"], has_bias=config.has_out_bias),
            ff_norm=self._norm(f"{at}.post_attention_layernorm"),
            up=self._linear([f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], has_bias=config.has_ff_bias),
            down=self._linear([f"{at}.mlp.down_proj"], has_bias=config.has_ff_bias),
            q_norm=self._norm(f"{at}.self_attn.q_norm") if config.has_qk_norm else None,
            k_norm=self._norm(f"{at}.self_attn.k_norm") if config.has_qk_norm else None,
        )

    def _linear(self, names: Sequence[str], *, has_bias: bool, is_transposed: bool = False) -> Linear:
        """One product for several that are given the same."""
        weights = [f"{self._base}{name}.weight" for name in names]
        bias = torch.cat([self._tensor(f"{name}.bias") for name in names]) if has_bias else None
        return make_linear(self._weight(weights, is_transposed=is_transposed), bias, self._kind)

    def _weight(self, names: Sequence[str], *, is_transposed: bool = False) -> Tensor | Rows:
        """Matrices under each other, (F, D)."""
        shapes = [self._files.find(name).shape for name in names]
        turned = [shape[::-1] if is_transposed else shape for shape in shapes]
        rows, width = sum(shape[0] for shape in turned), turned[0][1]
        is_rounded = self._device.type == "cpu" and not stays(width, self._kind, self._device)
        if is_rounded and not is_transposed:
            return Rows((rows, width), itertools.chain.from_iterable(map(self._files.chunks, names)))
        weight_FD = self._reserve(rows, width, is_rounded=is_rounded)
        row = 0
        for name, shape in zip(names, turned, strict=True):
            part = weight_FD[row : row + shape[0]]
            self._files.read_into(name, part.t() if is_transposed else part)
            row += shape[0]
        return weight_FD.to(self._device)

    def _reserve(self, rows: int, width: int, *, is_rounded: bool) -> Tensor:
        """(rows, width); what will be rounded lies where the one before did, as the system is slow to take back."""
        if not is_rounded:
            return torch.empty((rows, width), dtype=self._dtype)
        if self._scratch.numel() < rows * width:
            self._scratch = torch.empty(rows * width, dtype=self._dtype)
        return self._scratch[: rows * width].view(rows, width)

    def _norm(self, name: str) -> Norm:
        return Norm(self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias") if self._config.is_gpt2 else None)

    def _tensor(self, name: str) -> Tensor:
        tensor = torch.empty(self._files.find(self._base + name).shape, dtype=self._dtype)
        self._files.read_into(self._base + name, tensor)
        return tensor.to(self._device)
