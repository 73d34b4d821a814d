"""GPT: a decoder-only transformer in the shape of GPT-2, whose weights it can take over and give away.

Learned positions, layer norm before each sub-layer, tanh-GELU, biases everywhere, and a head that is the token
embedding itself (tied). Names carry their shape:

    B batch   T time (tokens)   D model   H heads   K head dim   F feed-forward   V vocab

Source    Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.init import InitRule, init_parameters
from smolcluster.models.sampling import sample_tokens
from smolcluster.models.stage import Layers

NORM_EPS = 1e-5  # GPT-2's; another value gives other logits from the same weights
# GPT-2's. With a tied head, torch's default of 1 for embeddings makes denormals, and a CPU step 12 times slower.
INIT_STD = 0.02
# On the CPU torch's attention in bfloat16 takes twice as long as in float32 for up to so many tokens: forward and
# backward of 8 x 128 tokens, 4 heads of 64, 13.5 ms and 6.7 (with AMX). From 256 on it is as fast.
FP32_ATTENTION_TOKENS = 128


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The sizes of a GPT.

    Attributes:
        vocab_size: V, number of token ids.
        model_dim: D, width of the residual stream.
        num_layers: number of blocks.
        num_heads: H; divides model_dim.
        ff_dim: F, width of the feed-forward layer; 4 * model_dim in GPT-2.
        dropout: probability, on embeddings, attention weights and both sub-layers' outputs.
        max_seq_len: longest sequence in tokens.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    ff_dim: int
    dropout: float
    max_seq_len: int

    def __post_init__(self) -> None:
        for key in ("vocab_size", "model_dim", "num_layers", "num_heads", "ff_dim", "max_seq_len"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.model_dim % self.num_heads:
            raise ConfigError(
                f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}. "
                "Change one of them, so that every head gets the same width"
            )


class Attention(nn.Module):
    """Causal self-attention of several heads, with one matrix product for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim)
        self.projection = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions 0 to t."""
        qkv_BTHK = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q_BHTK, k_BHTK, v_BHTK = (part_BTHK.transpose(1, 2) for part_BTHK in qkv_BTHK)
        out_BHTK = _attend(q_BHTK, k_BHTK, v_BHTK, self.dropout if self.training else 0.0)
        out_BTD: Tensor = self.projection(out_BHTK.transpose(1, 2).flatten(-2))
        return out_BTD


def _attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, dropout: float) -> Tensor:
    is_short = q_BHTK.shape[-2] <= FP32_ATTENTION_TOKENS
    if q_BHTK.dtype == torch.bfloat16 and q_BHTK.is_cpu and is_short:
        with torch.autocast("cpu", enabled=False):
            return _attend(q_BHTK.float(), k_BHTK.float(), v_BHTK.float(), dropout).to(q_BHTK.dtype)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, dropout_p=dropout, is_causal=True)


class FeedForward(nn.Module):
    """Each position by itself: D to F, tanh-GELU, F to D."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.ff_dim)
        self.down = nn.Linear(config.ff_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out_BTD: Tensor = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return out_BTD


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        # Each of the 2 * num_layers sub-layers adds to the residual stream; its width shall not grow with them.
        self._residual_std = INIT_STD / (2 * config.num_layers) ** 0.5

    def init_rule(self, name: str) -> InitRule:
        """GPT-2's: normal weights, narrower where they write to the residual stream; biases 0, norms 1."""
        if name in ("attention.projection.weight", "feed_forward.down.weight"):
            return InitRule("normal", self._residual_std)
        return _plain_rule(name)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        out_BTD: Tensor = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return out_BTD


class GPT(nn.Module):
    """Token ids to logits over the next token, at every position."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        """Build and initialise the model.

        Args:
            config: the sizes.
            seed: with the parameter's name it decides each parameter's initial value.
        """
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.model_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        init_parameters(self, seed)

    def init_rule(self, name: str) -> InitRule:
        """Embeddings and the last norm; a block has its own rule."""
        return _plain_rule(name)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_BT: (B, T) int64 with T <= max_seq_len; B may be 0.

        Returns:
            (B, T, V).

        Raises:
            ConfigError: T is more than max_seq_len.
        """
        return self.head(self.hidden(tokens_BT))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D): all but the head, which costs the most where the vocabulary is large."""
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        out_BTD: Tensor = self.norm(x_BTD)
        return out_BTD

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D): tokens and positions."""
        time = tokens_BT.shape[1]
        if time > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence of {time} tokens is longer than model.max_seq_len {self.config.max_seq_len}. "
                "Cut it, or train with a larger model.max_seq_len"
            )
        positions_T = torch.arange(time, device=tokens_BT.device)
        x_BTD: Tensor = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        return x_BTD

    def head(self, x_BTD: Tensor) -> Tensor:
        """(..., D) to logits (..., V), with the token embedding as the matrix: the weights are tied."""
        return F.linear(x_BTD, self.token_embedding.weight)

    def layers(self) -> Layers:
        """See models/stage.py."""
        blocks = tuple(f"blocks.{index}" for index in range(self.config.num_layers))
        return Layers(("token_embedding", "position_embedding"), blocks, ("norm", "token_embedding"))

    def forward_layers(self, x: Tensor, layers: range) -> Tensor:
        """(B, T) ids or (B, T, D) to (B, T, D) or logits (B, T, V); see models/stage.py."""
        for layer in layers:
            if layer == 0:
                x = self.embed(x)
            elif layer <= self.config.num_layers:
                x = self.blocks[layer - 1](x)
            else:
                x = self.head(self.norm(x))
        return x

    def generate(
        self,
        tokens_BT: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continue each sequence (B, T) by `max_new_tokens`; see `sample_tokens`."""
        return sample_tokens(
            self,
            lambda context_BT: self.head(self.hidden(context_BT)[:, -1]),
            tokens_BT,
            max_new_tokens,
            max_seq_len=self.config.max_seq_len,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )

    def export_state_dict(self) -> dict[str, Tensor]:
        """The weights under GPT-2's names and in its layout, as transformers' GPT2LMHeadModel.state_dict().

        Linear weights lie transposed there (its Conv1D is x @ weight). Tensors share memory with the model where the
        layout allows; `lm_head.weight` is the same tensor as `transformer.wte.weight`.
        """
        own = self.state_dict()
        exported = {
            name: (own[own_name].t().contiguous() if transposed else own[own_name])
            for name, own_name, transposed in _export_names(self.config.num_layers)
        }
        exported["lm_head.weight"] = exported["transformer.wte.weight"]
        return exported

    def export_names(self) -> Iterator[tuple[str, str, bool]]:
        """(GPT-2's name, own name, whether it lies transposed there) of each tensor of `export_state_dict`."""
        yield from _export_names(self.config.num_layers)
        yield "lm_head.weight", "token_embedding.weight", False

    def load_exported(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights under GPT-2's names, converted to this model's dtype; `lm_head.weight` may be absent.

        Raises:
            CheckpointError: a name is missing or unknown, a shape differs, or the head is not tied. The model is
                then unchanged.
        """
        own = self.state_dict()
        table = list(_export_names(self.config.num_layers))
        incoming = dict(tensors)
        head = incoming.pop("lm_head.weight", None)
        _check_names({name for name, _, _ in table}, set(incoming))
        values = {}
        for name, own_name, transposed in table:
            value = incoming[name].t() if transposed and incoming[name].dim() == 2 else incoming[name]
            if value.shape != own[own_name].shape:
                want = own[own_name].t().shape if transposed else own[own_name].shape
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(incoming[name].shape)}, but the model's sizes need "
                    f"{tuple(want)}. Set the model's sizes to those of the checkpoint"
                )
            values[own_name] = value
        if head is not None and not torch.equal(head, incoming["transformer.wte.weight"]):
            raise CheckpointError(
                "lm_head.weight differs from transformer.wte.weight: the checkpoint's head is not tied to its "
                "embedding, and model.type gpt has only tied heads. Use model.type hf"
            )
        with torch.no_grad():
            for own_name, value in values.items():
                own[own_name].copy_(value)


def _plain_rule(name: str) -> InitRule:
    if name.endswith(".bias"):
        return InitRule("zeros")
    if name.endswith("norm.weight"):
        return InitRule("ones")
    return InitRule("normal", INIT_STD)


def _export_names(num_layers: int) -> Iterator[tuple[str, str, bool]]:
    """(GPT-2's name, own name, whether it lies transposed there), in GPT-2's order, without the tied head."""
    yield "transformer.wte.weight", "token_embedding.weight", False
    yield "transformer.wpe.weight", "position_embedding.weight", False
    for index in range(num_layers):
        for part, own_part, is_linear in (
            ("ln_1", "attention_norm", False),
            ("attn.c_attn", "attention.qkv", True),
            ("attn.c_proj", "attention.projection", True),
            ("ln_2", "feed_forward_norm", False),
            ("mlp.c_fc", "feed_forward.up", True),
            ("mlp.c_proj", "feed_forward.down", True),
        ):
            yield f"transformer.h.{index}.{part}.weight", f"blocks.{index}.{own_part}.weight", is_linear
            yield f"transformer.h.{index}.{part}.bias", f"blocks.{index}.{own_part}.bias", False
    yield "transformer.ln_f.weight", "norm.weight", False
    yield "transformer.ln_f.bias", "norm.bias", False


def _check_names(wanted: set[str], given: set[str]) -> None:
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or unknown:
        raise CheckpointError(
            f"the tensors do not fit the model: {len(missing)} missing (first: {missing[:3]}), {len(unknown)} "
            f"unknown (first: {unknown[:3]}). Set model.num_layers to the checkpoint's; names are those of "
            "transformers' GPT2LMHeadModel"
        )
