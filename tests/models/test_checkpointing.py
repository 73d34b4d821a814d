"""Activation checkpointing: the same numbers to the bit, from less memory, and nothing done twice that may not be."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.equality import Case, build_gpt, check_equal, run_fsdp, run_single
from models.hf_folders import make_hf_folder
from smolcluster.config.schema import ModelConfig
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.checkpointing import _Recomputation, checkpoint_activations
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.training.step import AUTOCAST_DTYPES

VOCAB, TIME = 23, 12


def make_gpt(dropout: float = 0.0, layers: int = 3) -> GPT:
    return GPT(GPTConfig(VOCAB, 16, layers, 2, 64, dropout, TIME))


def make_hf(folder: Path, family: str, **changes: Any) -> nn.Module:
    path = make_hf_folder(folder, family, **changes)
    return build_model(ModelConfig(type="hf", hf_model_name=str(path), max_seq_len=TIME), seed=0, vocab_size=VOCAB)


def checkpointed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    checkpoint_activations(other)
    return other


def tokens(device: str = "cpu") -> Tensor:
    return torch.randint(0, VOCAB, (4, TIME), generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model: nn.Module, precision: str = "fp32", device: str = "cpu") -> dict[str, Tensor]:
    """Of the next token's loss; two micro-batches, so that the second begins where the first left the generator."""
    torch.manual_seed(3)
    inputs = tokens(device)
    half = AUTOCAST_DTYPES.get(precision)
    for part in inputs.chunk(2):
        with torch.autocast(device, dtype=half, enabled=half is not None):
            logits = model(part)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten()).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpts_gradients_are_the_same_bits(dropout: float, precision: str) -> None:
    model = make_gpt(dropout)
    expected = gradients(copy.deepcopy(model), precision)
    assert_same_bits(gradients(checkpointed(model), precision), expected)
    if precision != "fp32":
        full = gradients(copy.deepcopy(model))
        assert any(not torch.equal(full[name], grad) for name, grad in expected.items()), "autocast does nothing here"
    if dropout:
        plain = gradients(make_gpt(0.0), precision)
        assert any(not torch.equal(plain[name], grad) for name, grad in expected.items()), "nothing was dropped"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("qwen3", {"attention_dropout": 0.1}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradients_of_transformers_models_are_the_same_bits(
    family: str, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    model, other = (make_hf(tmp_path / name, family, **changes) for name in ("plain", "checkpointed"))
    assert checkpoint_activations(other) == 2
    assert_same_bits(gradients(other, precision), gradients(model, precision))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_and_precision_are_the_same_on_cuda(precision: str) -> None:
    model = make_gpt(0.1).cuda()
    expected, found = (gradients(each, precision, "cuda") for each in (copy.deepcopy(model), checkpointed(model)))
    for name, grad in expected.items():
        # Some kernels add in no fixed order; another mask would change every tenth value.
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_random_numbers_go_on_as_without() -> None:
    after = []
    for model in (make_gpt(0.1), checkpointed(make_gpt(0.1))):
        gradients(model)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_the_random_numbers_of_mps_are_repeated_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.tensor([5])

    def set_state(new: Tensor) -> None:
        state.copy_(new)

    monkeypatch.setattr(torch.mps, "get_rng_state", state.clone)
    monkeypatch.setattr(torch.mps, "set_rng_state", set_state)
    module: Any = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("mps"))], modules=list)
    recomputation = _Recomputation(module)
    state += 1  # forward drew
    for _ in range(2):  # backward may run twice over one graph
        with recomputation:
            assert state == 5
            state += 1
        assert state == 6


def test_hooks_of_a_block_run_once_and_those_within_it_again() -> None:
    model = checkpointed(make_gpt())
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_args: calls.update([name])

    block = model.get_submodule("blocks.1")
    block.register_forward_pre_hook(count("before"))
    block.register_forward_hook(count("after"))
    block.get_submodule("attention").register_forward_pre_hook(count("within"))
    model(tokens()).sum().backward()
    assert calls == {"before": 1, "after": 1, "within": 2}


def test_names_and_parameters_stay() -> None:
    model = make_gpt()
    names, params = list(model.state_dict()), list(model.parameters())
    assert checkpoint_activations(model) == 3
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), params, strict=True))
    assert type(model.get_submodule("blocks.0")).__name__ == "Block"
    make_gpt().load_state_dict(model.state_dict())


def saved_bytes(model: nn.Module) -> int:
    """What forward keeps for backward, parameters left out."""
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(tokens()).sum()  # the hooks let what is kept live until here
    for param in model.parameters():
        kept.pop(param.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_six_layers_keep_less_than_a_third() -> None:
    plain, less = saved_bytes(make_gpt(layers=6)), saved_bytes(checkpointed(make_gpt(layers=6)))
    # A block's input, 4 x 12 tokens of 16 float32, is what is left of it.
    assert 6 * 4 * TIME * 16 * 4 <= less < plain / 3


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_and_training_without_gradients_compute_once(training: bool) -> None:
    model = make_gpt()
    other = checkpointed(model).train(training)
    calls: Counter[str] = Counter()
    other.get_submodule("blocks.1.attention").register_forward_pre_hook(lambda *_args: calls.update(["forward"]))
    with torch.set_grad_enabled(not training):
        logits = other(tokens())
    assert torch.equal(logits, model(tokens()))
    if not training:  # evaluation keeps what a gradient needs, as without
        logits.sum().backward()
    assert calls["forward"] == 1
    assert saved_bytes(checkpointed(model).eval()) == saved_bytes(copy.deepcopy(model).eval())


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = checkpointed(make_gpt())
    before = model(tokens())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert torch.equal(other(tokens()), before)
    other(tokens()).sum().backward()
    assert all(param.grad is not None for param in other.parameters())
    assert all(param.grad is None for param in model.parameters())


class Pair(nn.Module):
    """A block that is called with names of checkpoint's own and gives more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, debug: tuple[Tensor, ...], context_fn: None = None) -> tuple[Tensor, None, Tensor]:
        x = F.dropout(self.linear(x).tanh(), 0.3)
        return x * debug[0], context_fn, x.cos()


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleDict({"first": Pair(), "second": Pair()})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            one, _, other = block(x, debug=(self.scale * 2,), context_fn=None)
            x = one + other
        return x


def test_any_arguments_and_results_pass_and_get_their_gradients() -> None:
    torch.manual_seed(0)
    model = Pairs()
    inputs = torch.randn(5, 8)
    found = []
    for each in (copy.deepcopy(model), checkpointed(model)):
        torch.manual_seed(2)
        each(inputs).square().sum().backward()
        found.append({name: param.grad for name, param in each.named_parameters()})
    assert_same_bits(found[1], found[0])
    assert found[1]["scale"] is not None


class Replacing(nn.Module):
    """Counts by a new buffer, where batch norm writes into the one that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return (x * self.weight).exp()


def test_running_statistics_count_a_batch_once() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    model = nn.Sequential(nn.Sequential(body, Replacing()), nn.Linear(6, 2))
    inputs = torch.randn(7, 6)
    found = []
    for each in (copy.deepcopy(model), checkpointed(model)):
        buffers = dict(each.named_buffers())
        each(inputs).square().sum().backward()
        assert buffers["0.0.1.running_mean"] is dict(each.named_buffers())["0.0.1.running_mean"]
        found.append(each.state_dict())
    assert_same_bits(found[1], found[0])
    assert found[1]["0.1.calls"] == found[1]["0.0.1.num_batches_tracked"] == 1


class Nested(nn.Module):
    """Its list has lists, which nobody calls: what is in them is a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))


def test_the_blocks_of_lists_in_lists_are_checkpointed() -> None:
    assert checkpoint_activations(Nested()) == 4


def test_a_model_without_blocks_is_refused_with_what_to_do() -> None:
    model = SimpleNN(12, 9, 5, 0)
    with pytest.raises(ConfigError, match=rf"nn.ModuleList.*{type(model).__name__} has none\. Set it to false"):
        checkpoint_activations(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_fsdp_gathers_a_block_before_it_computes_again(stage: int) -> None:
    def build(seed: int) -> nn.Module:
        return checkpointed(build_gpt(seed))

    case = Case(steps=12, micro_batches=2)
    ranks = run_fsdp(Case(build=build, steps=12, micro_batches=2), 2, stage)
    check_equal(run_single(case), ranks, "fp64")
