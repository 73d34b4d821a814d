"""Stages of a model, one behind the other, compute what the whole model does."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolcluster.errors import ConfigError
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.hf import HFModel
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.models.stage import Stage, layer_parameters, layers_of, tied_parameters

VOCAB = 37
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8,
}  # fmt: skip
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}),
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", SIZES | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", SIZES | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 3}),
    "gemma2": ("Gemma2Config", SIZES | {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", SIZES),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": 4, "n_head": 2, "hidden_dropout": 0.0,
                              "attention_dropout": 0.0}),
    "ctrl": ("CTRLConfig", {"n_embd": 16, "dff": 24, "n_layer": 4, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
                            "embd_pdrop": 0.0}),
    "opt": ("OPTConfig", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
                          "word_embed_proj_dim": 8, "max_position_embeddings": 32}),
}  # fmt: skip


def build_hf(name: str) -> HFModel:
    transformers = pytest.importorskip("transformers")
    kind, sizes = HF_MODELS[name]
    torch.manual_seed(1)
    changes = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    changes |= {"dropout": 0.0} if name == "opt" else {}
    config = getattr(transformers, kind)(**COMMON, **sizes, **changes)
    return HFModel(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), 32).double()


def build_gpt() -> GPT:
    return GPT(GPTConfig(VOCAB, 16, 4, 2, 24, 0.0, 32)).double()


def check_cut(model: nn.Module, inputs: Tensor, targets: Tensor, bounds: list[int]) -> None:
    """Cut the model behind these layers; logits and gradients are those of the whole."""
    every = layers_of(model)
    edges = [0, *bounds, len(every)]
    stages = [Stage(copy.deepcopy(model), range(a, b)) for a, b in itertools.pairwise(edges)]
    outs, ins = [], []
    x = inputs
    for stage in stages:
        ins.append(x)
        outs.append(stage(x))
        x = outs[-1].detach().requires_grad_()
    logits = model(inputs)
    assert torch.allclose(outs[-1], logits, rtol=0, atol=1e-13)

    F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    F.cross_entropy(outs[-1].flatten(0, -2), targets.flatten()).backward()
    for number in range(len(stages) - 2, -1, -1):
        if outs[number].requires_grad:  # not where a stage has no parameters
            outs[number].backward(ins[number + 1].grad)
    found: dict[str, Tensor] = {}
    for stage in stages:
        for name, param in stage.parameters.items():
            assert param.grad is not None, name
            found[name] = found[name] + param.grad if name in found else param.grad
    expected = {name: param.grad for name, param in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        assert torch.allclose(found[name], grad, rtol=0, atol=1e-13), name


@pytest.mark.parametrize("bounds", [[1], [3], [1, 5], [2, 3, 4], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("name", ["gpt", *HF_MODELS])
def test_stages_compute_what_the_whole_model_does(name: str, bounds: list[int]) -> None:
    model = build_gpt() if name == "gpt" else build_hf(name)
    tokens = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    check_cut(model, tokens, tokens.roll(-1, dims=1), bounds)


@pytest.mark.parametrize("bounds", [[1], [2], [1, 2]])
def test_a_simple_network_has_three_layers(bounds: list[int]) -> None:
    check_cut(SimpleNN(12, 8, 5).double(), torch.randn(7, 3, 4).double(), torch.arange(7) % 5, bounds)


def test_a_sequential_is_cut_between_its_modules() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    check_cut(model, torch.randn(7, 12).double(), torch.arange(7) % 5, [2, 4])


def build_tied(*between: nn.Module) -> nn.Sequential:
    """A Sequential whose last module has the first one's weight."""
    model = nn.Sequential(nn.Embedding(VOCAB, 6), *between, nn.Linear(6, VOCAB))
    model[-1].weight = model[0].weight
    return model.double()


@pytest.mark.parametrize(
    ("between", "bounds"), [((), [1]), ((nn.Linear(6, 6), nn.Tanh()), [1]), ((nn.Linear(6, 6), nn.Tanh()), [1, 2, 3])]
)
def test_a_sequentials_ends_are_its_entry_and_exit_if_they_share_a_weight(
    between: tuple[nn.Module, ...], bounds: list[int]
) -> None:
    model = build_tied(*between)
    every = layers_of(model)
    assert (every.entry, len(every.blocks), every.exit) == (("0",), len(between), (str(len(between) + 1),))
    assert tied_parameters(model, every) == ["0.weight"]
    tokens = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    check_cut(model, tokens, tokens.roll(-1, dims=1), bounds)


class Doubled(nn.Sequential):
    """Does more than to run its modules."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Sequential):
    """Has a constructor of its own, no more."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh())


def test_a_sequential_that_does_more_than_to_run_its_modules_is_refused() -> None:
    """What is cut runs the modules; what a forward or a hook of its own does would not be done."""
    assert layers_of(Named()).blocks == ("0", "1")
    hooked = [nn.Sequential(nn.Linear(3, 3)) for _ in range(4)]
    hooked[0].register_forward_hook(lambda module, args, out: 2 * out)
    hooked[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    hooked[2].register_full_backward_hook(lambda module, inputs, outs: None)
    hooked[3].forward = lambda x: x  # type: ignore[method-assign, assignment, misc]
    for model in (Doubled(nn.Linear(3, 3)), *hooked, nn.Sequential()):
        with pytest.raises(ConfigError, match="cannot be cut into stages"):
            layers_of(model)


@pytest.mark.parametrize(("name", "tied"), [("gpt", 1), ("gpt2", 1), ("llama", 0), ("llama-tied", 1)])
def test_tied_parameters_are_found(name: str, tied: int) -> None:
    model = build_gpt() if name == "gpt" else build_hf(name)
    every = layers_of(model)
    names = tied_parameters(model, every)
    assert len(names) == tied
    for name in names:
        assert name in layer_parameters(model, every, 0)
        assert name in layer_parameters(model, every, len(every) - 1)


def test_a_stage_has_its_own_parameters_only_under_the_models_names() -> None:
    model = build_gpt()
    names = {name for name, _ in model.named_parameters()}
    stage = Stage(copy.deepcopy(model), range(2, 4))
    assert list(stage.module.parameters()) == list(stage.parameters.values())
    assert set(stage.parameters) == {name for name in names if name.startswith(("blocks.1.", "blocks.2."))}


def test_what_cannot_be_cut_says_so() -> None:
    with pytest.raises(ConfigError, match=r"nn\.Sequential"):
        layers_of(nn.Linear(3, 3))


class FakePart(nn.Module):
    """Part of a block; says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "causal"
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class FakeBlock(nn.Module):
    """Gives a tensor, or with others a tuple."""

    def __init__(self, number: int, others: int) -> None:
        super().__init__()
        self.attention_type = "full" if number % 2 else "sliding"
        self.attention = FakePart()
        self.others = others
        self.kept = [torch.ones(6)]

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor | tuple[Tensor, ...]:
        out = x + scale * self.attention(x)
        return (out, *[out.mean() + number for number in range(self.others - 1)]) if self.others else out


class FakeCausalLM(nn.Module):
    """As transformers' models are; `style` says what its forward does with its blocks."""

    def __init__(self, style: str, blocks: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=6))
        self.style = style
        self.embed = nn.Embedding(VOCAB, 6)
        others = {
            "takes the first": 1,
            "takes the first of two": 2,
            "uses the second": 2,
            "unpacks": 2,
            "passes the second on": 2,
        }
        self.blocks = nn.ModuleList(FakeBlock(number, others.get(style, 0)) for number in range(blocks))
        self.head = nn.Linear(6, VOCAB, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False
    ) -> Any:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        shape = x.shape
        if self.style == "scales in place":
            x *= 3.0
        if self.style == "needs ids":
            given: Any = input_ids
            x = x + given.shape[1]
        scale: Any = x.mean() if self.style == "gives blocks something of the text" else 1.0
        for number, block in enumerate(self.blocks):
            if self.style == "reads the block":
                out = block(x, scale={"full": 1.0, "sliding": 0.5}[block.attention_type])
            elif self.style == "reads the block's part":
                out = block(x, scale={"causal": 0.5}[block.attention.kind])
            else:
                out = block(x, scale=scale)
            if self.style in ("takes the first", "takes the first of two"):
                x = out[0]
            elif self.style == "uses the second":
                x = out[0] * out[1]
            elif self.style == "unpacks":
                x, mean = out
                x = x * mean
            elif self.style == "passes the second on":
                x, scale = out[0], out[1] if len(out) > 1 else scale
            else:
                x = out + number if self.style == "adds between blocks" else out
        return SimpleNamespace(logits=self.head(x.view(-1, *shape[1:])))


def build_fake(style: str, blocks: int = 3) -> HFModel:
    torch.manual_seed(1)
    return HFModel(FakeCausalLM(style, blocks).double(), None)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    "style",
    [
        *("plain", "reads the block", "reads the block's part", "takes the first", "takes the first of two"),
        "scales in place",
    ],
)
def test_what_a_models_forward_may_do_with_its_blocks(style: str, blocks: int) -> None:
    """As transformers 4.56 to 5.0 do: they read `attention_type`, and take `outputs[0]`, of a tensor the first text."""
    tokens = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    for bounds in ([1], [blocks + 1], list(range(1, blocks + 2))):
        check_cut(build_fake(style, blocks), tokens, tokens.roll(-1, dims=1), bounds)


@pytest.mark.parametrize(
    "style",
    [
        *("uses the second", "unpacks", "passes the second on", "adds between blocks", "needs ids"),
        "gives blocks something of the text",
    ],
)
def test_a_model_that_is_more_than_a_chain_of_blocks_is_refused(style: str) -> None:
    """Each of these computes something else when it is cut."""
    with pytest.raises(ConfigError, match="a FakeCausalLM cannot be cut"):
        layers_of(build_fake(style))


def test_a_stand_in_keeps_nothing_of_its_block_in_memory() -> None:
    model = build_fake("reads the block")
    assert checkpoint_activations(model) == 3  # which leaves each block's own forward among its attributes
    held = [weakref.ref(tensor) for block in model.inner.blocks for tensor in (*block.parameters(), *block.kept)]
    stage = Stage(model, range(1))
    gc.collect()
    assert all(ref() is None for ref in held)
    assert [stand_in.attention_type for stand_in in stage.module.get_submodule("blocks").children()] == [
        *("sliding", "full", "sliding")
    ]
