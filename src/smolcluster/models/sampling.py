"""Text from any language model, token by token: every token runs the whole context again (no KV cache)."""

# ruff: noqa: N803, N806 - shape suffixes are capitals: B batch, T time, V vocab

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smolcluster.errors import ConfigError


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    last_logits: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    max_new_tokens: int,
    *,
    max_seq_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue each sequence; blocks. Dropout is off meanwhile.

    Args:
        model: its mode is restored afterwards.
        last_logits: tokens (B, T) to logits (B, V) of the token that follows.
        tokens_BT: (B, T) int64 on the model's device, T at least 1.
        max_new_tokens: how many to append.
        max_seq_len: a longer context is cut to its last so many tokens.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: sample from the k likeliest tokens; None: from all.
        seed: of the sampling; the same on every device, as tokens are drawn on the CPU.

    Returns:
        (B, T + max_new_tokens), the given tokens first.

    Raises:
        ConfigError: no token to continue from, a negative temperature, or top_k below 1.
    """
    _check_sampling(tokens_BT, temperature, top_k)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits_BV = last_logits(tokens_BT[:, -max_seq_len:]).float().cpu()
            next_B = _sample(logits_BV, temperature, top_k, generator)
            tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT)], dim=1)
    finally:
        model.train(was_training)
    return tokens_BT


def _check_sampling(tokens_BT: Tensor, temperature: float, top_k: int | None) -> None:
    if tokens_BT.dim() != 2 or tokens_BT.shape[1] == 0:
        raise ConfigError(
            f"generate needs tokens of shape (B, T) with T at least 1, got {tuple(tokens_BT.shape)}. "
            "Give a prompt of at least one token; for one sequence, tokens[None]"
        )
    if temperature < 0.0:
        raise ConfigError(f"temperature is {temperature}; it must be at least 0 (0: always the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be at least 1, or None to sample from all tokens")


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        kept_BV, ids_BV = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
        logits_BV = torch.full_like(logits_BV, float("-inf")).scatter(-1, ids_BV, kept_BV)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]
