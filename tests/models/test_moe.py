"""MoE: routing, capacity, losses, and the parts of a step that know of them."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolcluster.algorithms.single import Single
from smolcluster.config.schema import ModelConfig
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.models.moe import Block, MoE, MoEConfig, MoELayer, moe_layers
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.step import forward_backward, has_auxiliary_loss
from smolcluster.training.trainer import Trainer

VOCAB, DIM, TIME, EXPERTS, TOP_K = 19, 16, 8, 5, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small tensors take 40 times as long on two busy cores
    yield
    torch.set_num_threads(before)


def config(**options: Any) -> MoEConfig:
    return MoEConfig(VOCAB, DIM, 2, 2, 12, 0.0, TIME, **{"num_experts": EXPERTS, "capacity_factor": None, **options})


def some_tokens(samples: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (samples, TIME), generator=torch.Generator().manual_seed(seed))


def layer_and_rows(**options: Any) -> tuple[MoELayer, Tensor]:
    """A layer in float64 whose router has an opinion, and (3, 8, D) rows."""
    model = MoE(config(**options)).double()
    layer = moe_layers(model)["blocks.0.moe"]
    with torch.no_grad():
        layer.router.weight.mul_(4)
    rows = torch.randn(3, TIME, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return layer, rows + 0.5  # what rows have in common makes loads uneven


def naive(layer: MoELayer, x_BTD: Tensor, capacity: float = float("inf")) -> tuple[Tensor, int]:
    """One token after the other, one expert after the other; and the tokens that an expert had no room for."""
    taken = [0] * EXPERTS
    dropped: set[int] = set()
    out = torch.zeros_like(x_BTD).flatten(0, 1)
    for number, row in enumerate(x_BTD.flatten(0, 1)):
        probabilities = (layer.router.weight @ row).softmax(dim=0)
        chosen = probabilities.argsort(descending=True)[:TOP_K].tolist()
        for expert in chosen:
            taken[expert] += 1
            if taken[expert] > capacity:
                dropped.add(number)
            else:
                weight = probabilities[expert] / probabilities[chosen].sum()
                module = layer.experts[expert]
                out[number] += weight * module.down(F.silu(module.gate(row)) * module.up(row))
    return out.view(x_BTD.shape), len(dropped)


def test_a_token_gets_the_weighted_sum_of_its_likeliest_experts() -> None:
    layer, rows = layer_and_rows()
    torch.testing.assert_close(layer(rows), naive(layer, rows)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 10), (0.5, 5), (1.2, 12), (0.01, 1)])
def test_an_expert_takes_no_more_than_its_capacity_and_the_first_tokens_first(factor: float, capacity: int) -> None:
    layer, rows = layer_and_rows(capacity_factor=factor)  # 24 tokens, 48 assignments, 9.6 of them an even share
    layer.notes = True
    expected, dropped = naive(layer, rows, capacity)
    torch.testing.assert_close(layer(rows), expected, rtol=0, atol=1e-15)
    assert layer.routing is not None
    assert int(layer.routing.dropped) == dropped > 0
    # Some lose one of their two experts, some both.
    assert dropped <= int((layer.routing.own_counts - capacity).clamp(min=0).sum()) <= 2 * dropped


@pytest.mark.parametrize(("factor", "top_k", "dropped"), [(None, 2, 0), (1.0, 2, 14), (2.5, 2, 0), (1.0, 1, 19)])
def test_a_dropped_token_counts_once_in_each_layer_however_many_of_its_experts_are_full(
    factor: float | None, top_k: int, dropped: int
) -> None:
    """All 24 tokens choose the same experts, which have room for factor * 24 * top_k / 5 of them, rounded up."""
    model = MoE(config(capacity_factor=factor, top_k=top_k))
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Block)
            block.moe_norm.weight.zero_()
            block.moe_norm.bias.fill_(1.0)
            block.moe.router.weight.copy_(torch.arange(EXPERTS)[:, None].expand(EXPERTS, DIM) / -DIM)
    forward_backward(model, [Batch(some_tokens(3), some_tokens(3, 1))], 1.0, step=0)
    assert model.metrics(model.take_sums())["moe/dropped_tokens"] == 2 * dropped
    assert model.metrics(model.take_sums())["moe/dropped_tokens"] == 0


def test_dropped_tokens_of_several_micro_batches_are_added_up() -> None:
    model = MoE(config(capacity_factor=1.0))
    batches = [Batch(some_tokens(samples, samples), some_tokens(samples)) for samples in (3, 2, 0)]
    each = []
    for parts in ([batches[0]], [batches[1]], [batches[2]], batches):
        forward_backward(model, parts, 1.0, step=0)
        each.append(model.metrics(model.take_sums())["moe/dropped_tokens"])
    assert each[0] > 0
    assert each[1] > 0
    assert each[2:] == [0, each[0] + each[1]]


def test_evaluation_drops_nothing() -> None:
    layer, rows = layer_and_rows(capacity_factor=0.1)
    torch.testing.assert_close(layer.eval()(rows), naive(layer, rows)[0], rtol=0, atol=1e-15)


def test_a_token_that_is_dropped_by_all_experts_passes_on_the_residual_stream() -> None:
    layer, rows = layer_and_rows(capacity_factor=0.01, top_k=1)
    out = layer(rows).flatten(0, 1)
    assert int((out == 0).all(dim=1).sum()) == 24 - len(layer.router(rows.flatten(0, 1)).argmax(dim=1).unique())


def test_losses_are_those_of_switch_and_st_moe() -> None:
    model = MoE(config(aux_loss_weight=0.3, z_loss_weight=0.2)).double()
    logits: list[Tensor] = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(lambda _module, _rows, out: logits.append(out))
    model.begin_micro_batch(0, 0)
    model(some_tokens(3))
    found = model.auxiliary_loss(7)

    expected = torch.zeros((), dtype=torch.float64)
    balances, squares = [], []
    for of_layer in logits:
        chosen = of_layer.topk(TOP_K, dim=1).indices.flatten()
        fractions = torch.bincount(chosen, minlength=EXPERTS).double() / len(chosen)
        balances.append(EXPERTS * (fractions * of_layer.softmax(dim=1).mean(dim=0)).sum())
        squares.append(of_layer.logsumexp(dim=1).square().mean())
        expected = expected + 7 * (0.3 * balances[-1] + 0.2 * squares[-1])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found_grad, expected_grad = (
        torch.autograd.grad(loss, model.blocks[0].moe.router.weight, retain_graph=True)[0] for loss in (found, expected)
    )
    torch.testing.assert_close(found_grad, expected_grad)
    metrics = model.metrics(model.take_sums())
    assert metrics["moe/aux_loss"] == pytest.approx(float(sum(balances).detach()) / 2)
    assert metrics["moe/z_loss"] == pytest.approx(float(sum(squares).detach()) / 2)
    assert model.metrics(model.take_sums())["moe/z_loss"] == 0


def test_a_step_adds_the_losses_weighted_by_targets_and_reports_the_plain_one() -> None:
    model = MoE(config(aux_loss_weight=0.3)).double()
    assert has_auxiliary_loss(model)
    batches = []
    for seed, samples in ((1, 3), (2, 1)):
        targets = some_tokens(samples, seed + 10)
        targets[:, : 2 * seed] = NO_TARGET
        batches.append(Batch(some_tokens(samples, seed), targets))
    counts = [int((batch.targets != NO_TARGET).sum()) for batch in batches]

    plain, total = 0.0, torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        model.begin_micro_batch(0, 0)
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        plain += float(loss.detach())
        total = total + (loss + model.auxiliary_loss(count)) / sum(counts)
    expected = torch.autograd.grad(total, list(model.parameters()))

    found = forward_backward(model, batches, 1 / sum(counts), step=0)
    assert float(found) == pytest.approx(plain)
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_the_balancing_loss_balances() -> None:
    def load_after(weight: float) -> float:
        model = MoE(config(aux_loss_weight=weight, z_loss_weight=0.0))
        with torch.no_grad():
            for block in model.blocks:
                block.moe_norm.bias.fill_(0.5)
                block.moe.router.weight[:TOP_K] += 0.5  # all tokens go to the first experts
        strategy = Single(model, optimizer_factory("adamw", 1e-2))
        loads = []
        for step in range(60):
            tokens = some_tokens(16, step % 4)
            result = strategy.train_step([Batch(tokens, tokens.roll(-1, 1))])
            assert result is not None
            assert result.metrics is not None
            loads.append(result.metrics["moe/expert_load_max"])
        return sum(loads[-5:]) / 5

    assert load_after(0.0) > 2.4  # of 2.5
    assert load_after(0.1) < 1.5


def test_on_text_the_default_weight_keeps_every_expert_below_twice_the_even_load() -> None:
    """The short form of benchmarks/expert_balance.py."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics))[:200_000].encode()))

    def load_after(**options: float) -> float:
        model = MoE(MoEConfig(256, 32, 2, 2, 32, 0.0, 32, capacity_factor=None, **options), seed=1)  # type: ignore[arg-type] # floats only
        strategy = Single(model, optimizer_factory("adamw", 3e-3))
        generator = torch.Generator().manual_seed(1)
        loads = []
        for _ in range(100):
            begins = torch.randint(0, len(text) - 33, (16,), generator=generator).tolist()
            windows = torch.stack([text[begin : begin + 33] for begin in begins])
            result = strategy.train_step([Batch(windows[:, :-1], windows[:, 1:])])
            assert result is not None
            assert result.metrics is not None
            loads.append(result.metrics["moe/expert_load_max"])
        return statistics.median(loads[-10:])

    assert ModelConfig().aux_loss_weight == config().aux_loss_weight
    # Measured: 3.5, and 1.5; with Switch's 0.01 it is 2.3.
    assert load_after(aux_loss_weight=0.0) > 2.8
    assert load_after() < 1.9


def test_noise_depends_on_seed_step_sample_and_layer_alone() -> None:
    model = MoE(config(router_noise=0.5), seed=3)

    def noise(step: int, first: int, samples: int, layer: str = "blocks.0.moe", of: MoE = model) -> Tensor:
        of.begin_micro_batch(step, first)
        return moe_layers(of)[layer]._noise(samples, TIME).view(samples, TIME, EXPERTS)

    both = noise(2, 4, 2)
    assert torch.equal(both[1:], noise(2, 5, 1))
    others = [noise(3, 4, 2), noise(2, 4, 2, "blocks.1.moe"), noise(2, 4, 2, of=MoE(config(router_noise=0.5), seed=4))]
    assert all(not torch.isclose(both, other).any() for other in others)
    assert float(noise(0, 0, 500).std()) == pytest.approx(0.5, rel=0.02)


def test_noise_is_refused_where_nobody_knows_the_samples() -> None:
    model = MoE(config(router_noise=0.5))
    with pytest.raises(ConfigError, match=r"model\.router_noise is 0\.5, .* train with algorithm single or ep"):
        forward_backward(model, [Batch(some_tokens(2), some_tokens(2))], 1.0)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model = MoE(config())
    forward_backward(model, [Batch(some_tokens(1)[:, :1], some_tokens(1)[:, :1])], 1.0, step=0)
    norms = [
        float(param.grad.norm())
        for name, param in model.named_parameters()
        if ".experts." in name and param.grad is not None
    ]
    assert len(norms) == 2 * EXPERTS * 3
    assert 0.0 in norms


def test_checkpointed_activations_give_the_same_step_to_the_bit() -> None:
    def gradients(is_checkpointed: bool) -> tuple[list[Tensor | None], dict[str, float]]:
        model = MoE(config(capacity_factor=1.0, router_noise=0.1))
        if is_checkpointed:
            checkpoint_activations(model)
        batches = [Batch(some_tokens(3, seed), some_tokens(3, seed + 1)) for seed in (1, 2)]
        forward_backward(model, batches, 1.0, step=4)
        return [param.grad for param in model.parameters()], model.metrics(model.take_sums())

    plain, plain_metrics = gradients(False)
    again, again_metrics = gradients(True)
    assert plain_metrics == again_metrics
    for mine, theirs in zip(again, plain, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def test_names_in_a_checkpoint_and_parameter_count() -> None:
    section = ModelConfig(
        type="moe", model_dim=DIM, num_layers=2, num_heads=2, ff_dim=12, max_seq_len=TIME, capacity_factor=None
    )
    model = build_model(section, seed=1, vocab_size=VOCAB)
    assert isinstance(model, MoE)
    assert (model.config.num_experts, model.config.top_k, model.config.capacity_factor) == (8, 2, None)
    assert "blocks.1.moe.experts.7.up.weight" in model.state_dict()
    assert "blocks.1.moe.router.weight" in model.state_dict()
    embedding, attention, norms = (VOCAB + TIME) * DIM, 4 * DIM * DIM + 4 * DIM, 4 * DIM
    moe = 8 * 3 * DIM * 12 + 8 * DIM
    assert sum(param.numel() for param in model.parameters()) == embedding + 2 * (attention + norms + moe) + 2 * DIM


def test_it_generates_and_takes_batches_without_samples() -> None:
    model = MoE(config(capacity_factor=1.0))
    assert model(some_tokens(0)).shape == (0, TIME, VOCAB)
    written = model.generate(some_tokens(2)[:, :3], 4, top_k=3, seed=1)
    assert written.shape == (2, 7)
    with pytest.raises(ConfigError, match=r"a sequence of 9 tokens is longer than model\.max_seq_len 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, r"model\.top_k is 6; it must be 1 to model\.num_experts, which is 5"),
        ({"capacity_factor": 0.0}, r"model\.capacity_factor is 0\.0; it must be above 0, or null for all"),
        ({"z_loss_weight": -1.0}, r"model\.z_loss_weight is -1\.0"),
        ({"num_heads": 3}, r"model\.model_dim 16 is not a multiple"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "model_dim": DIM, "num_layers": 2, "num_heads": 2, "ff_dim": 12}
    sizes |= {"dropout": 0.0, "max_seq_len": TIME, "num_experts": EXPERTS}
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**{**sizes, **options})


class Rows:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def progress(self, done: int, total: int, row: dict[str, Any]) -> None:
        pass


def test_a_step_s_row_has_what_the_model_measured() -> None:
    strategy = Single(MoE(config(capacity_factor=0.5)), optimizer_factory("adamw", 1e-3), staleness_bound=1)
    batches = [[Batch(some_tokens(3, seed), some_tokens(3, seed + 1))] for seed in range(3)]
    sink = Rows()
    Trainer(strategy, batches, 3).run(sink)
    names = ("moe/aux_loss", "moe/z_loss", "moe/expert_load_max", "moe/dropped_tokens")
    assert [all(row[name] > 0 for name in names) for row in sink.rows] == [True] * 3
    # 2 layers of 24 tokens with 2 choices each, of which the experts take at most 5 * 5: at least 12 tokens lose one.
    assert all(2 * 12 <= row["moe/dropped_tokens"] <= 2 * 24 for row in sink.rows)
