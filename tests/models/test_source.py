"""Models on the meta device and their values in parts: the bits of the whole model, and the memory of a part."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.hf_folders import TIME, VOCAB, make_hf_folder, transformers
from smolcluster.config.schema import ModelConfig
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.gpt2 import save_gpt2
from smolcluster.models.hf import HFModel, draw_hf_parameters, init_hf_parameters
from smolcluster.models.partition import split_into_units
from smolcluster.models.source import ModelSource, model_source, parameters_on_meta

SEED = 3
FAMILIES = ("gpt2", "llama", "qwen2", "gpt_neox")


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def section(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"type": "hf", "hf_model_name": str(folder), "max_seq_len": TIME, **changes})


def make_folder(folder: Path, family: str, *, tied: bool) -> Path:
    if family != "gpt_neox":
        return make_hf_folder(folder, family, tie_word_embeddings=tied)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": TIME}
    config = transformers().GPTNeoXConfig(**sizes, **ends, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        transformers().AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def source_of(config: ModelConfig, **sizes: int) -> ModelSource:
    source = model_source(config, seed=SEED, **sizes)
    assert source is not None
    return source


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].device.type == "cpu", name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def assert_source_is_the_model(config: ModelConfig, **sizes: int) -> None:
    """Structure, ties, buffers and, unit by unit, the values of `build_model`."""
    whole = build_model(config, seed=SEED, **sizes)
    state = torch.get_rng_state()
    source = source_of(config, **sizes)
    model = source.build()
    assert type(model) is type(whole)
    assert model.training
    assert all(param.is_meta for param in model.parameters())
    assert_same_bits(dict(model.named_buffers()), dict(whole.named_buffers()))
    assert set(model.state_dict()) == set(whole.state_dict())
    shapes = {name: (param.shape, param.dtype, param.requires_grad) for name, param in whole.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == shapes
    units = split_into_units(model)
    assert [(u.name, u.parameters) for u in units] == [(u.name, u.parameters) for u in split_into_units(whole)]
    for param in model.parameters():
        param.requires_grad_(False)
    for module in model.modules():  # as FSDP leaves it behind: nothing may depend on it
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(torch.empty(0))
    found: dict[str, Tensor] = {}
    for unit in [*units[1:], units[0]]:
        values = source.values(unit)
        assert set(values) == set(unit.parameters)
        found |= values
    assert_same_bits(found, dict(whole.named_parameters()))
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"


def test_simple_nn_and_gpt_are_drawn_in_parts() -> None:
    assert_source_is_the_model(ModelConfig(type="simple_nn", input_dim=20, hidden=7, out=4), num_classes=4)
    sizes = {"model_dim": 8, "num_layers": 3, "num_heads": 2, "ff_dim": 12, "max_seq_len": 6, "dropout": 0.25}
    assert_source_is_the_model(ModelConfig(type="gpt", **sizes), vocab_size=VOCAB)


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_comes_in_parts(
    family: str, tied: bool, init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = section(make_folder(tmp_path, family, tied=tied), init=init)
    assert_source_is_the_model(config, vocab_size=VOCAB)
    model = source_of(config).build()
    assert isinstance(model, HFModel)
    assert (model.inner.get_input_embeddings().weight is model.inner.get_output_embeddings().weight) is tied
    assert not caplog.records, "it was built as a whole"


def test_files_in_shards_and_in_half_precision_come_in_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for family in ("llama", "gpt2"):
        folder = make_hf_folder(tmp_path / family, family)
        model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="4KB")
        assert (folder / "model.safetensors.index.json").exists()
        assert_source_is_the_model(section(folder, init="pretrained"))
    assert_source_is_the_model(section(tmp_path / "gpt2", type="gpt", init="pretrained"))
    assert not caplog.records


def test_a_gpt2_folder_comes_in_parts(tmp_path: Path) -> None:
    model = GPT(GPTConfig(VOCAB, 12, 2, 3, 20, 0.0, TIME), seed=8)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.rand_like(param))
    save_gpt2(model, tmp_path)
    config = section(tmp_path, type="gpt", init="pretrained")
    assert_source_is_the_model(config, vocab_size=VOCAB)

    # as published: other names, masks, and here a head of the same values
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, TIME, TIME).tril(), "lm_head.weight": old["wte.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors")
    assert_source_is_the_model(config, vocab_size=VOCAB)


def test_a_folder_of_the_inner_model_comes_in_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = make_hf_folder(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert_source_is_the_model(section(folder, init="pretrained"))
    assert not caplog.records


def test_what_a_folder_says_about_writing_and_saving_is_kept(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", "gpt_neox", tied=False)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    config = section(folder, init="pretrained")
    whole, model = build_model(config, seed=0), source_of(config).build()
    assert isinstance(whole, HFModel)
    assert isinstance(model, HFModel)
    assert model.inner.generation_config.to_dict() == whole.inner.generation_config.to_dict()
    assert model.inner.generation_config.max_new_tokens == 7
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    model.save_pretrained(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(saved, load_file(folder / "model.safetensors"))


def test_rope_is_scaled_as_in_the_whole_model(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
    make_hf_folder(tmp_path, "llama", rope_parameters=rope, rope_scaling=rope)
    for init in ("random", "pretrained"):
        assert_source_is_the_model(section(tmp_path, init=init))


# --- what cannot be had in parts


def test_a_class_of_the_users_own_has_no_source() -> None:
    assert model_source(ModelConfig(type="somewhere:Model"), seed=0) is None


def test_experts_that_transformers_merges_are_loaded_whole_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = transformers().MixtralConfig(**sizes, **experts, vocab_size=VOCAB, max_position_embeddings=TIME)
    transformers().AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = build_model(section(tmp_path), seed=0).state_dict()
    if stored.keys() == own.keys():
        pytest.skip("this release of transformers has the files' names")
    caplog.set_level("INFO")
    assert_source_is_the_model(section(tmp_path, init="pretrained"))
    assert ["built whole" in record.getMessage() for record in caplog.records] == [True]


def test_values_of_a_constructor_are_built_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_hf_folder(tmp_path, "llama")
    modeling = transformers().models.llama.modeling_llama
    original = modeling.LlamaMLP.__init__

    def with_gate(self: Any, config: Any) -> None:
        original(self, config)
        self.gate_scale = nn.Parameter(torch.rand(3))  # which no rule of transformers knows

    monkeypatch.setattr(modeling.LlamaMLP, "__init__", with_gate)
    assert_source_is_the_model(section(folder))


def test_a_constructor_that_looks_at_its_values_is_built_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_hf_folder(tmp_path, "llama")
    modeling = transformers().models.llama.modeling_llama
    original = modeling.LlamaMLP.__init__

    def with_look(self: Any, config: Any) -> None:
        original(self, config)
        self.largest = self.up_proj.weight.max().item()

    def with_buffer(self: Any, config: Any) -> None:
        original(self, config)
        self.register_buffer("beginning", self.up_proj.weight.detach().clone())

    for init in (with_look, with_buffer):
        with monkeypatch.context() as patch:
            patch.setattr(modeling.LlamaMLP, "__init__", init)
            assert_source_is_the_model(section(folder))


def test_a_head_that_differs_from_the_embedding_that_it_is_tied_to_is_loaded_as_transformers_does(
    tmp_path: Path,
) -> None:
    folder = make_hf_folder(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_source_is_the_model(section(folder, init="pretrained"))
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_source_is_the_model(section(folder, init="pretrained"))


class Inner(nn.Module):
    """Has a rule that draws parameters of all blocks one after the other, as some models of transformers do."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5)) for _ in range(3))
        self.body.norm = nn.LayerNorm(5)

    def tie_weights(self) -> None: ...

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ModuleList):
            for name, param in module.named_parameters():
                if name.endswith("1.weight"):
                    param.copy_(torch.randn_like(param))
                    param.t().normal_(std=0.5)
                    param[1:3].uniform_(-1, 1)


def test_a_rule_that_draws_for_several_units_gives_each_its_numbers() -> None:
    whole = Inner()
    with torch.random.fork_rng():
        init_hf_parameters(whole, SEED)
    with parameters_on_meta():
        model = HFModel(Inner(), None)
    found: dict[str, Tensor] = {}
    for unit in reversed(split_into_units(model)):
        values = draw_hf_parameters(model, unit.parameters, SEED)
        assert values is not None
        assert all(param.is_meta for param in model.parameters())
        found |= values
    assert_same_bits(found, dict(whole.named_parameters()))


def test_ranks_that_are_threads_get_the_same_numbers(tmp_path: Path) -> None:
    config = section(make_hf_folder(tmp_path, "gpt2", n_layer=6))
    wanted = dict(build_model(config, seed=SEED).named_parameters())
    found: list[dict[str, Tensor]] = []

    def play_rank() -> None:
        source = source_of(config)
        values: dict[str, Tensor] = {}
        for unit in split_into_units(source.build()):
            values |= source.values(unit)
        found.append(values)

    threads = [threading.Thread(target=play_rank, name=f"rank-{rank}") for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    for values in found:
        assert_same_bits(values, wanted)


# --- what is refused


def test_what_build_model_refuses_is_refused(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "llama", "llama")
    gpt2 = make_hf_folder(tmp_path / "gpt2", "gpt2")
    untied = make_hf_folder(tmp_path / "untied", "gpt2")
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, untied / "model.safetensors")
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"intermediate_size": 24}))
    bert = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    transformers().BertConfig(**bert, vocab_size=VOCAB).save_pretrained(tmp_path / "bert")
    for config, sizes in [
        (ModelConfig(type="simple_nn", out=2), {"num_classes": 10}),
        (ModelConfig(type="gpt", vocab_size=100), {"vocab_size": 256}),
        (ModelConfig(type="gpt"), {}),
        (ModelConfig(type="moe"), {}),
        (ModelConfig(type="hf"), {}),
        (section(gpt2, type="gpt", init="pretrained", max_seq_len=TIME + 1), {}),
        (section(gpt2, type="gpt", init="pretrained"), {"vocab_size": 256}),
        (section(folder, type="gpt", init="pretrained"), {}),
        (section(untied, type="gpt", init="pretrained"), {}),
        (section(folder), {"vocab_size": 24}),
        (section(folder, init="pretrained"), {"vocab_size": 24}),
        (section(folder, max_seq_len=TIME + 1), {}),
        (section(lacking, init="pretrained"), {}),
        (section(other, init="pretrained"), {}),
        (section(tmp_path / "bert"), {}),
        (section(tmp_path / "nowhere", init="pretrained"), {}),
    ]:
        with pytest.raises((ConfigError, CheckpointError)) as wanted:
            build_model(config, seed=SEED, **sizes)
        with pytest.raises(type(wanted.value)) as caught:
            source_of(config, **sizes).build()
        assert str(caught.value) == str(wanted.value)


@pytest.mark.parametrize("kind", ["hf", "gpt"])
def test_a_damaged_file_is_named_as_in_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "gpt2")
    config = section(folder, type=kind, init="pretrained")
    source = source_of(config)
    units = split_into_units(source.build())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read") as wanted:
        build_model(config, seed=SEED)
    with pytest.raises(CheckpointError) as caught:
        source_of(config).build()
    assert str(caught.value) == str(wanted.value)
    with pytest.raises(CheckpointError) as later:
        source.values(units[1])
    assert str(later.value) == str(wanted.value)


# --- the meta device


class Odd(nn.Module):
    """Registers a parameter twice, and changes and reads others after they were registered."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.ones(2, 3))
        shared.is_special = True  # type: ignore[attr-defined]
        self.first = shared
        self.second = shared
        self.third = self.first
        self.linear = nn.Linear(3, 3)
        self.linear.weight.data.fill_(2.0)
        nn.init.orthogonal_(self.linear.weight)
        self.frozen = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("kept", torch.arange(4.0), persistent=False)
        self.lazy = nn.LazyLinear(2)


def test_only_parameters_go_to_the_meta_device_and_ties_stay_ties() -> None:
    with parameters_on_meta():
        model = Odd()
    assert model.first is model.second is model.third
    assert model.first.is_special
    assert not model.frozen.requires_grad
    assert model.frozen.dtype == torch.int64
    real = [name for name, param in model.named_parameters() if not param.is_meta]
    assert real == ["lazy.weight", "lazy.bias"]
    assert torch.equal(model.get_buffer("kept"), torch.arange(4.0))
    assert not any(param.is_meta for param in Odd().parameters()), "afterwards all is as before"


def test_models_of_other_threads_have_their_values() -> None:
    made: list[nn.Module] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)), name="other")
        thread.start()
        thread.join(30)
    assert not made[0].weight.is_meta


# --- memory

# Peaks of each source, in bytes above what the process held before; run by itself, where nothing else allocates.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from smolcluster.config.schema import ModelConfig
from smolcluster.models.partition import split_into_units
from smolcluster.models.source import model_source

def field(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def peak_of(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = field("VmRSS")
    result = call()
    return result, field("VmHWM") - before

torch.set_num_threads(1)
found = []
for small, large in json.loads(sys.argv[1]):
    for case, is_measured in ((small, False), (large, True)):  # the first loads libraries
        source = model_source(ModelConfig(**case), seed=0)
        model, built = peak_of(source.build)
        units = split_into_units(model)
        sizes = [sum(model.get_parameter(name).nbytes for name in unit.parameters) for unit in units]
        source.values(units[0])  # whatever it remembers, it makes now
        peaks = [peak_of(lambda unit=unit: source.values(unit) and None)[1] for unit in units]
        if is_measured:
            found.append({"built": built, "sizes": sizes, "peaks": peaks})
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures with Linux's /proc")
def test_no_more_than_a_unit_or_two_is_in_memory(tmp_path: Path) -> None:
    # 12 blocks of 15 MB each: far above what Python itself allocates, and above the 2 MB pages of large files
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    sizes: dict[str, dict[str, int]] = {
        "gpt2": {"n_layer": 12, "n_embd": 558, "n_inner": 2232},
        "llama": {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 1792, **heads},
    }
    for family, large in sizes.items():
        make_hf_folder(tmp_path / family / "small", family)
        make_hf_folder(tmp_path / family / "large", family, **large)

    def published(family: str, **changes: str) -> list[dict[str, object]]:
        common = {"max_seq_len": TIME, **changes}
        return [{**common, "hf_model_name": str(tmp_path / family / size)} for size in ("small", "large")]

    gpt = {"type": "gpt", "vocab_size": VOCAB, "max_seq_len": TIME}
    cases = {
        "gpt drawn": [
            {**gpt, "num_layers": 1},
            {**gpt, "num_layers": 12, "model_dim": 558, "num_heads": 3, "ff_dim": 2232},
        ],
        "gpt read": published("gpt2", type="gpt", init="pretrained"),
        "hf drawn": published("llama", type="hf", init="random"),
        "hf read": published("llama", type="hf", init="pretrained"),
    }
    # What is freed goes back to the system at once.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([*cases.values()])],
        env=environ,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    for case, measured in zip(cases, json.loads(done.stdout), strict=True):
        largest = max(measured["sizes"])
        assert sum(measured["sizes"]) > 11 * largest
        # Values from a file are there twice: the file's pages, which the system may take back, and the copy.
        assert max(measured["peaks"]) < 2.5 * largest, (case, measured)
        # Less than a parameter stays; what a constructor has at a time is one.
        assert measured["built"] < largest, (case, measured)
