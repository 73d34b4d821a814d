import pytest
import torch
from torch import nn

from smolcluster.models.gpt import GPT, Block, GPTConfig
from smolcluster.models.init import InitRule, draw_parameter, init_parameters
from smolcluster.models.simple_nn import SimpleNN

CONFIG = GPTConfig(vocab_size=11, model_dim=8, num_layers=3, num_heads=2, ff_dim=16, dropout=0.0, max_seq_len=5)


class Ruled(nn.Module):
    """A module that draws all its parameters, its children's too, from one rule."""

    def __init__(self, rule: InitRule, *children: nn.Module) -> None:
        super().__init__()
        self.rule = rule
        self.children_ = nn.ModuleList(children)
        self.own = nn.Parameter(torch.full((4,), 7.0))

    def init_rule(self, name: str) -> InitRule:
        return self.rule


def test_a_part_alone_starts_from_the_numbers_it_has_in_the_whole_model() -> None:
    whole = GPT(CONFIG, seed=5)
    for index in range(CONFIG.num_layers):
        block = Block(CONFIG)
        init_parameters(block, seed=5, prefix=f"blocks.{index}.")
        assert len(list(block.parameters())) == 12
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(f"blocks.{index}.{name}")), name


def test_float64_starts_from_the_same_numbers_as_float32() -> None:
    single, double = GPT(CONFIG, seed=1), GPT(CONFIG, seed=2).double()
    init_parameters(double, seed=1)
    for name, parameter in single.named_parameters():
        assert double.get_parameter(name).dtype == torch.float64
        assert torch.equal(parameter.double(), double.get_parameter(name)), name


def test_global_random_state_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    first = SimpleNN(seed=3)
    torch.manual_seed(2)
    second = SimpleNN(seed=4)
    before = torch.get_rng_state()
    init_parameters(second, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_values_depend_on_seed_and_on_name() -> None:
    rule = InitRule("normal", 1.0)
    value = draw_parameter("a.weight", (8,), rule, seed=0)
    assert torch.equal(value, draw_parameter("a.weight", (8,), rule, seed=0))
    assert not torch.equal(value, draw_parameter("a.weight", (8,), rule, seed=1))
    assert not torch.equal(value, draw_parameter("b.weight", (8,), rule, seed=0))
    assert not torch.equal(
        GPT(CONFIG, seed=0).blocks[0].attention.qkv.weight, GPT(CONFIG, seed=0).blocks[1].attention.qkv.weight
    )


def test_values_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    rule = InitRule("normal", 1.0)
    with torch.device("meta"):
        value = draw_parameter("a.weight", (8,), rule, seed=0)
    assert torch.equal(value, draw_parameter("a.weight", (8,), rule, seed=0))


def test_rules_give_their_distribution() -> None:
    count = 40_000
    normal = draw_parameter("w", (count,), InitRule("normal", 0.02), seed=0)
    # The mean of n draws deviates by std / sqrt(n), the deviation by std / sqrt(2 n); 5 of each is never seen.
    assert abs(normal.mean()) < 5 * 0.02 / count**0.5
    assert abs(normal.std() / 0.02 - 1) < 5 / (2 * count) ** 0.5
    uniform = draw_parameter("w", (count,), InitRule("uniform", 0.5), seed=0)
    assert uniform.min() >= -0.5
    assert uniform.max() <= 0.5
    assert uniform.min() < -0.499
    assert uniform.max() > 0.499
    assert abs(uniform.mean()) < 5 * 0.5 / (3 * count) ** 0.5
    assert torch.equal(draw_parameter("w", (2, 3), InitRule("zeros"), seed=0), torch.zeros(2, 3))
    assert torch.equal(draw_parameter("w", (2, 3), InitRule("ones"), seed=0), torch.ones(2, 3))


def test_a_module_without_a_rule_keeps_its_own_values() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_parameters(model, seed=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_innermost_rule_decides() -> None:
    plain = nn.Linear(2, 2)
    inner = Ruled(InitRule("ones"))
    model = nn.Sequential(Ruled(InitRule("zeros"), plain, inner))
    init_parameters(model, seed=0)
    assert torch.equal(plain.weight, torch.zeros(2, 2))
    assert torch.equal(model[0].own, torch.zeros(4))
    assert torch.equal(inner.own, torch.ones(4))


def test_a_tied_parameter_counts_under_its_first_name() -> None:
    rule = InitRule("normal", 1.0)
    model = Ruled(rule, nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model.children_[1].weight = model.children_[0].weight
    init_parameters(model, seed=9)
    assert torch.equal(model.children_[1].weight, draw_parameter("children_.0.weight", (2, 2), rule, seed=9))


def test_the_meta_device_is_left_alone_and_filled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.delattr("smolcluster.models.init.draw_parameter")  # nothing is drawn in vain
        model = GPT(CONFIG, seed=5)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_parameters(model, seed=5)
    for ours, theirs in zip(model.parameters(), GPT(CONFIG, seed=5).parameters(), strict=True):
        assert torch.equal(ours, theirs)
