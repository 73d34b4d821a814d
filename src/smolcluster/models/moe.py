"""MoE: a decoder-only transformer like Mixtral, in which a router sends each token to a few of many experts.

Idea      Each block has E feed-forward networks (experts) in place of one. A router gives every expert a probability
          for every token; the token goes to its `top_k` likeliest experts, and what they give is added up, weighted by
          their probabilities. So a model has the parameters of E experts and costs the time of `top_k`. Left alone, a
          router sends ever more tokens to the experts that learnt first; a load-balancing loss works against it, and
          `capacity_factor` bounds what an expert takes: a token beyond it does without, and passes by on the residual
          stream if no other expert takes it.
Names     B batch   T time (tokens)   D model   F feed-forward   V vocab   E experts   C choices (top_k)
          N tokens of this rank (B * T)   M their assignments that experts take   A assignments that experts here
          compute   R ranks
Source    Jiang et al. 2024, Mixtral of Experts, arXiv:2401.04088, section 2.1 (top-k, SwiGLU experts); Fedus et al.
          2021, Switch Transformers, arXiv:2101.03961, section 2.2 (capacity, load-balancing loss); Zoph et al. 2022,
          ST-MoE, arXiv:2202.08906, section 3.1 (z-loss)

Attention, learned positions, layer norm and the head that is tied to the embedding are those of gpt.py. Experts may lie
on other ranks: the layer knows of that only through its Exchange (collectives/dispatch.py has the one that sends).
Capacity, like the losses, is for training only: what is evaluated or generated does not depend on its company.
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolcluster.errors import ConfigError
from smolcluster.models.gpt import INIT_STD, NORM_EPS, Attention, GPTConfig
from smolcluster.models.init import InitRule, init_parameters, named_seed
from smolcluster.models.sampling import sample_tokens

# Entries of `MoE.take_sums` before its one entry for each expert of each layer.
_SUMS = 4


@dataclass(frozen=True, slots=True)
class MoEConfig(GPTConfig):
    """The sizes of a MoE; ff_dim is the width of one expert.

    Attributes:
        num_experts: E, experts of each block.
        top_k: C, experts that each token is sent to.
        capacity_factor: an expert takes at most so many times the even share of a micro-batch's assignments; None:
            all.
        aux_loss_weight: of the load-balancing loss, for each layer.
        z_loss_weight: of the router's z-loss, for each layer.
        router_noise: standard deviation of what is added to the router's logits in training.
    """

    num_experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = 1.25
    aux_loss_weight: float = 0.05  # as in config/schema.py
    z_loss_weight: float = 0.001
    router_noise: float = 0.0

    def __post_init__(self) -> None:
        GPTConfig.__post_init__(self)  # slots make another class of this one, which super() does not know
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"model.top_k is {self.top_k}; it must be 1 to model.num_experts, which is {self.num_experts}"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ConfigError(f"model.capacity_factor is {self.capacity_factor}; it must be above 0, or null for all")
        for key in ("aux_loss_weight", "z_loss_weight", "router_noise"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"model.{key} is {getattr(self, key)}; it must be at least 0")


class Exchange(Protocol):
    """How a layer's tokens get to its experts and back. All ranks call the same methods in the same order.

    Attributes:
        rank: of this process, among those that the tokens lie on.
        experts: numbers of the experts that are computed here.
    """

    rank: int
    experts: range

    def all_counts(self, counts_E: Tensor) -> Tensor:
        """Each rank's assignments to each expert: (R, E) int64 on the CPU, from this rank's (E,)."""
        ...

    def to_experts(self, rows_MD: Tensor, kept_RE: Tensor) -> Tensor:
        """The rows of all ranks for the experts here, (A, D): by expert, and for each in the order of the ranks.

        Args:
            rows_MD: this rank's, by expert.
            kept_RE: how many rows each rank has for each expert, on the CPU.
        """
        ...

    def from_experts(self, rows_AD: Tensor, kept_RE: Tensor) -> Tensor:
        """The way back: (A, D) to (M, D)."""
        ...


class Here:
    """All experts are here; the Exchange that exchanges nothing."""

    def __init__(self, num_experts: int) -> None:
        self.rank = 0
        self.experts = range(num_experts)

    def all_counts(self, counts_E: Tensor) -> Tensor:
        """(E,) to (1, E)."""
        return counts_E.cpu()[None]

    def to_experts(self, rows_MD: Tensor, kept_RE: Tensor) -> Tensor:
        """The rows themselves."""
        return rows_MD

    def from_experts(self, rows_AD: Tensor, kept_RE: Tensor) -> Tensor:
        """The rows themselves."""
        return rows_AD


@dataclass(frozen=True, slots=True)
class Routing:
    """What a layer did with a micro-batch; losses are this rank's part of their sum over the tokens of all ranks.

    Attributes:
        balance: (), E * sum over the experts of (fraction of all assignments) * (sum of probabilities). Divided by the
            tokens it is 1 where the load is even.
        z: (), sum of logsumexp(logits)^2.
        tokens: of this rank.
        all_tokens: of all ranks.
        own_counts: (E,), this rank's assignments by expert, before any is dropped; on the CPU.
        dropped: (), this rank's tokens that at least one of their experts had no room for.
    """

    balance: Tensor
    z: Tensor
    tokens: int
    all_tokens: int
    own_counts: Tensor
    dropped: Tensor


class Router(nn.Module):
    """One logit per token and expert, in float32 or wider: half precision would change who is chosen."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.model_dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, E)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(wide), self.weight.to(wide))


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.model_dim, config.ff_dim, bias=False)
        self.up = nn.Linear(config.model_dim, config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, config.model_dim, bias=False)

    def forward(self, x_AD: Tensor) -> Tensor:
        """(A, D) to (A, D)."""
        out_AD: Tensor = self.down(F.silu(self.gate(x_AD)) * self.up(x_AD))
        return out_AD


class MoELayer(nn.Module):
    """Router and experts.

    Attributes:
        exchange: how tokens get to experts.
        routing: of the last forward in training, if `notes` was set.
        notes: whether forward is to keep it.
        place: (step, number of the first sample in the global batch), which noise depends on; None: unknown.
        noise_seed: which noise depends on too; ranks with parts of one model have the same.
    """

    def __init__(self, config: MoEConfig, number: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))
        self.exchange: Exchange = Here(config.num_experts)
        self.routing: Routing | None = None
        self.notes = False
        self.place: tuple[int, int] | None = None
        self.noise_seed = seed
        self._number = number

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); zeros for a token that none of its experts took. B may be 0."""
        x_ND = x_BTD.flatten(0, -2)
        logits_NE = self.router(x_ND)
        if self.training and self.config.router_noise > 0:
            logits_NE = logits_NE + self._noise(x_BTD.shape[0], x_BTD.shape[1]).to(logits_NE)
        probabilities_NE = logits_NE.softmax(dim=-1)
        likeliest_NC, chosen_NC = probabilities_NE.topk(self.config.top_k, dim=-1)
        weights_NC = likeliest_NC / likeliest_NC.sum(dim=-1, keepdim=True)

        assigned_NE = torch.zeros_like(probabilities_NE, dtype=torch.int64).scatter_(1, chosen_NC, 1)
        counts_RE = self.exchange.all_counts(assigned_NE.sum(dim=0))
        order_M, kept_RE, dropped = self._admit(chosen_NC, assigned_NE, counts_RE)
        if self.training:
            # Also where it is not kept: activation checkpointing wants the same computation in backward again.
            routing = self._note(logits_NE, probabilities_NE, counts_RE, dropped)
            self.routing = routing if self.notes else None

        rows_MD = _in_autocast_dtype(x_ND.index_select(0, order_M // self.config.top_k))
        arrived_AD = self.exchange.to_experts(rows_MD, kept_RE)
        computed_AD = self._compute(arrived_AD, kept_RE.sum(dim=0).tolist())
        back_MD = self.exchange.from_experts(computed_AD, kept_RE)

        # Each assignment in its place and then a sum, not one addition after the other: the same bits on any device.
        places = back_MD.new_zeros(chosen_NC.numel(), x_ND.shape[-1]).index_copy(0, order_M, back_MD)
        places_NCD = places.view(*chosen_NC.shape, x_ND.shape[-1])
        out_BTD: Tensor = (places_NCD * weights_NC.unsqueeze(-1)).sum(dim=1).to(x_BTD.dtype).view(x_BTD.shape)
        return out_BTD

    def _admit(self, chosen_NC: Tensor, assigned_NE: Tensor, counts_RE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which assignments experts take.

        Experts take them in the order of the global batch, so that it does not matter how many ranks it is dealt to.

        Returns:
            Their places in `chosen_NC`, (M,), by expert; how many each rank has of them, (R, E); and how many tokens of
            this rank at least one of their experts has no room for, ().
        """
        experts = chosen_NC.flatten()
        if not self.training or self.config.capacity_factor is None:
            return experts.argsort(stable=True), counts_RE, experts.new_zeros(())
        total, experts_number = int(counts_RE.sum()), self.config.num_experts
        capacity = math.ceil(self.config.capacity_factor * total / experts_number)
        before_RE = counts_RE.cumsum(dim=0) - counts_RE
        kept_RE = (capacity - before_RE).clamp(min=0).minimum(counts_RE)
        place_NE = before_RE[self.exchange.rank].to(experts.device) + assigned_NE.cumsum(dim=0) - assigned_NE
        is_taken_NC = (place_NE < capacity).gather(1, chosen_NC)
        order = torch.where(is_taken_NC.flatten(), experts, experts_number).argsort(stable=True)
        return order[: int(kept_RE[self.exchange.rank].sum())], kept_RE, (~is_taken_NC).any(dim=1).sum()

    def _compute(self, rows_AD: Tensor, rows_of: list[int]) -> Tensor:
        """Each expert here on its rows. One without rows too: its gradient is zero then, on any number of ranks."""
        own = self.exchange.experts
        pieces = torch.split(rows_AD, [rows_of[number] for number in own]) if own else ()
        computed = [self.experts[number](piece_AD) for number, piece_AD in zip(own, pieces, strict=True)]
        if computed:
            return torch.cat(computed)
        # The other ranks' experts want gradients, which all ranks send, even if nothing before them is trained.
        wants_grad = torch.is_grad_enabled() and any(param.requires_grad for param in self.experts.parameters())
        return rows_AD.requires_grad_() if wants_grad and not rows_AD.requires_grad else rows_AD

    def _note(self, logits_NE: Tensor, probabilities_NE: Tensor, counts_RE: Tensor, dropped: Tensor) -> Routing:
        total = int(counts_RE.sum())
        fractions_E = (counts_RE.sum(dim=0).double() / max(total, 1)).to(probabilities_NE)
        return Routing(
            balance=self.config.num_experts * (fractions_E * probabilities_NE.sum(dim=0)).sum(),
            z=logits_NE.logsumexp(dim=-1).square().sum(),
            tokens=len(logits_NE),
            all_tokens=total // self.config.top_k,
            own_counts=counts_RE[self.exchange.rank],
            dropped=dropped,
        )

    def _noise(self, samples: int, tokens: int) -> Tensor:
        """(N, E) float32 on the CPU, of each sample from (seed, step, its number, layer)."""
        if self.place is None:
            raise ConfigError(
                f"model.router_noise is {self.config.router_noise}, but nothing says which samples these are. Set it "
                "to 0, or train with algorithm single or ep"
            )
        step, first = self.place
        noise = torch.empty(samples, tokens, self.config.num_experts)
        for row, number in enumerate(range(first, first + samples)):
            seed = named_seed(f"router_noise.{self._number}.{step}.{number}", self.noise_seed)
            noise[row].normal_(0.0, self.config.router_noise, generator=torch.Generator().manual_seed(seed))
        return noise.flatten(0, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: MoEConfig, number: int, seed: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        self.attention = Attention(config)
        self.moe_norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        self.moe = MoELayer(config, number, seed)
        self.dropout = nn.Dropout(config.dropout)
        # Each of the 2 * num_layers sub-layers adds to the residual stream; its width shall not grow with them.
        self._residual_std = INIT_STD / (2 * config.num_layers) ** 0.5
        # What an expert gives grows with the square of its scale: with GPT-2's, made for widths of thousands, experts
        # 64 wide give next to nothing, and 300 steps of tiny Shakespeare end at a loss of 2.8 in place of 2.4.
        self._inner_std = config.model_dim**-0.5

    def init_rule(self, name: str) -> InitRule:
        """GPT-2's, but for gates, ups and routers, whose outputs begin with a deviation of 1."""
        if name == "moe.router.weight" or name.endswith((".gate.weight", ".up.weight")):
            return InitRule("normal", self._inner_std)
        if name == "attention.projection.weight" or name.endswith(".down.weight"):
            return InitRule("normal", self._residual_std)
        return _plain_rule(name)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        out_BTD: Tensor = x_BTD + self.dropout(self.moe(self.moe_norm(x_BTD)))
        return out_BTD


class MoE(nn.Module):
    """Token ids to logits over the next token, at every position; see training.step.HasAuxiliaryLoss for the rest."""

    def __init__(self, config: MoEConfig, seed: int = 0) -> None:
        """Build and initialise the model.

        Args:
            config: the sizes.
            seed: with the parameter's name it decides each parameter's initial value; noise comes from it as well.
        """
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.model_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, number, seed) for number in range(config.num_layers))
        self.norm = nn.LayerNorm(config.model_dim, eps=NORM_EPS)
        self._losses: Tensor | None = None  # (2,), sums of `balance` and `z`
        self._dropped: Tensor | None = None  # (), on the model's device: to fetch it for each layer would stall a GPU
        self._numbers = torch.zeros(1 + config.num_layers * config.num_experts, dtype=torch.int64)
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
        time = tokens_BT.shape[1]
        if time > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence of {time} tokens is longer than model.max_seq_len {self.config.max_seq_len}. "
                "Cut it, or train with a larger model.max_seq_len"
            )
        positions_T = torch.arange(time, device=tokens_BT.device)
        x_BTD: Tensor = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        out_BTD: Tensor = self.norm(x_BTD)
        return out_BTD

    def head(self, x_BTD: Tensor) -> Tensor:
        """(..., D) to logits (..., V), with the token embedding as the matrix: the weights are tied."""
        return F.linear(x_BTD, self.token_embedding.weight)

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

    # ---- losses besides the cross-entropy, and what is measured

    def begin_micro_batch(self, step: int | None, first_sample: int) -> None:
        """The next forward is to be noted; `first_sample` is the number of its first sample in the global batch."""
        for layer in moe_layers(self).values():
            layer.notes, layer.routing = self.training, None
            layer.place = None if step is None else (step, first_sample)

    def auxiliary_loss(self, targets: int) -> Tensor:
        """`targets` times the weighted losses of the noted forward, summed over the layers; (), with gradients.

        Of several ranks each has its part: the parts add up to the loss of the whole micro-batch.
        """
        total = torch.zeros((), device=self.token_embedding.weight.device)
        for number, layer in enumerate(moe_layers(self).values()):
            routing, layer.routing, layer.notes = layer.routing, None, False
            if routing is None:
                continue  # evaluating
            weighted = self.config.aux_loss_weight * routing.balance + self.config.z_loss_weight * routing.z
            total = total + weighted * (targets / max(routing.all_tokens, 1))
            losses = torch.stack([routing.balance.detach(), routing.z.detach()])
            self._losses = losses if self._losses is None else self._losses + losses
            self._dropped = routing.dropped if self._dropped is None else self._dropped + routing.dropped
            self._numbers[0] += routing.tokens
            begin = 1 + number * self.config.num_experts
            self._numbers[begin : begin + self.config.num_experts] += routing.own_counts
        return total

    def take_sums(self) -> Tensor:
        """What was noted since the last call, to be added up over ranks: (n,) float64 on the CPU. Blocks."""
        losses = torch.zeros(2) if self._losses is None else self._losses.cpu()
        dropped = torch.zeros(()) if self._dropped is None else self._dropped.cpu()
        tokens, counts = self._numbers[:1], self._numbers[1:]
        sums = torch.cat([losses.double(), tokens.double(), dropped.double()[None], counts.double()])
        self._losses = self._dropped = None
        self._numbers.zero_()
        return sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Of `take_sums`, added up over ranks.

        `moe/aux_loss` is the load-balancing loss without its weight, a mean over the layers: 1 where the load is even.
        `moe/expert_load_max` is the largest load of an expert of any layer, over the even load. `moe/dropped_tokens`
        are the tokens that at least one of their experts had no room for, once for each layer where that was so.
        """
        balance, z, tokens, dropped = sums[:_SUMS].tolist()
        counts_LE = sums[_SUMS:].view(self.config.num_layers, self.config.num_experts)
        even_L = counts_LE.mean(dim=1).clamp(min=1e-9)
        return {
            "moe/aux_loss": balance / max(tokens, 1.0),
            "moe/z_loss": z / max(tokens, 1.0),
            "moe/expert_load_max": float((counts_LE.amax(dim=1) / even_L).max()),
            "moe/dropped_tokens": dropped,
        }


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers with experts by their names in the model, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def _in_autocast_dtype(rows: Tensor) -> Tensor:
    """Experts compute in it anyway, and in it rows are half as long on their way."""
    kind = rows.device.type
    return rows.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else rows


def _plain_rule(name: str) -> InitRule:
    if name.endswith(".bias"):
        return InitRule("zeros")
    if name.endswith("norm.weight"):
        return InitRule("ones")
    return InitRule("normal", INIT_STD)
