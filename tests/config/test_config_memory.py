"""What a model needs: parameters as the real modules have them, bytes as the algorithms hold them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolcluster.config import memory
from smolcluster.config.load import check_file, load_config
from smolcluster.config.memory import GIB, MemoryEstimate, estimate_memory, model_sizes
from smolcluster.config.schema import Config
from smolcluster.models.build import build_model
from smolcluster.models.checkpointing import checkpoint_activations


def parameter_count(found: Config) -> int | None:
    sizes = model_sizes(found)
    return None if sizes is None else sizes.parameters


def config(model: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate({"model": model, **sections})


SMALL_GPT = {"type": "gpt", "model_dim": 24, "num_layers": 3, "num_heads": 2, "ff_dim": 40, "max_seq_len": 16}


@pytest.mark.parametrize(
    "model",
    [
        {"type": "simple_nn"},
        {"type": "simple_nn", "input_dim": 7, "hidden": 5, "out": 3},
        SMALL_GPT,
        {**SMALL_GPT, "vocab_size": 1000},
    ],
)
def test_the_parameters_are_those_of_the_real_model(model: dict[str, Any]) -> None:
    found = config(model)
    module = build_model(found.model, seed=0, vocab_size=256)
    assert parameter_count(found) == sum(param.numel() for param in module.parameters())


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "vocab_size": 99, **HEADS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20, "vocab_size": 99}),
    "gpt2 with its own width": ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 50}),
    "llama": ("Llama", SIZES),
    "llama, tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**SIZES, "head_dim": 16}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("family", "sizes"), FAMILIES.values(), ids=FAMILIES.keys())
def test_the_parameters_of_a_local_folder_are_those_of_transformers(
    tmp_path: Path, family: str, sizes: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    described = getattr(transformers, f"{family}Config")(**sizes)
    described.save_pretrained(tmp_path)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(described)
    found = config({"type": "hf", "hf_model_name": str(tmp_path)})
    assert parameter_count(found) == sum(param.numel() for param in module.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("openai-community/gpt2", 124_439_808), ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400)]
)
def test_the_published_models_have_their_published_size(name: str, count: int) -> None:
    assert parameter_count(config({"type": "hf", "hf_model_name": name})) == count


def test_a_pretrained_gpt_has_the_sizes_of_what_it_takes_over() -> None:
    model = {"type": "gpt", "init": "pretrained", "hf_model_name": "gpt2", "num_layers": 2}
    assert parameter_count(config(model)) == 124_439_808


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "unheard-of"}'])
def test_what_cannot_be_counted_is_unknown_and_warns_of_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    for model in ({"type": "hf", "hf_model_name": str(tmp_path)}, {"type": "my:Net"}):
        assert parameter_count(config(model)) is None
        assert memory.memory_warning(config(model, cluster={"memory": 1e-9})) is None
    assert parameter_count(config({"type": "hf", "hf_model_name": "somebody/unheard-of"})) is None


def test_the_ids_of_a_local_tokenizer_are_counted(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 9, "content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        found = config(SMALL_GPT, data={"tokenizer": str(place)})
        assert parameter_count(found) == parameter_count(config({**SMALL_GPT, "vocab_size": 10}))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 9}', encoding="utf-8")
    found = config(SMALL_GPT, data={"tokenizer": str(tmp_path)})
    assert parameter_count(found) == parameter_count(config({**SMALL_GPT, "vocab_size": 10}))
    assert parameter_count(config(SMALL_GPT, data={"tokenizer": "somebody/unheard-of"})) is None


def test_experts_multiply_the_feed_forward_layer_and_add_a_router() -> None:
    plain = parameter_count(config(SMALL_GPT)) or 0
    feed_forward, expert, router = 2 * 24 * 40 + 40 + 24, 3 * 24 * 40, 4 * 24
    assert parameter_count(config({**SMALL_GPT, "type": "moe", "num_experts": 4})) == plain + 3 * (
        4 * expert + router - feed_forward
    )


# --- bytes of a rank

WHOLE = 4 * 101_770  # the perceptron's weights in fp32


def held(algorithm: str, world_size: int = 4, is_server: bool = False, **sections: Any) -> tuple[int, int, int]:
    found = config({"type": "simple_nn"}, algorithm=algorithm, **sections)
    estimate = estimate_memory(found, world_size, is_server=is_server)
    assert estimate is not None
    return estimate.weights, estimate.gradients, estimate.optimizer


@pytest.mark.parametrize(
    ("algorithm", "cluster", "expected"),
    [
        ("single", {}, (1, 1, 2)),
        ("classicdp", {}, (1, 1, 2)),
        ("classicdp", {"staleness_bound": 3}, (1, 4, 2)),
        ("fsdp", {"fsdp_stage": 0}, (1, 1, 2)),
        ("fsdp", {"fsdp_stage": 1}, (1, 1, 2 / 4)),
        # So small a model is one bucket and one unit, which is whole while it is used.
        ("fsdp", {"fsdp_stage": 2}, (1, 1 + 1 / 4, 2 / 4)),
        ("fsdp", {"fsdp_stage": 3}, (1 + 1 / 4, 1 + 1 / 4, 2 / 4)),
        ("syncps", {}, (1, 1, 0)),
        ("mp", {}, (1 / 4, 1 / 4, 2 / 4)),
        ("mp_pipeline", {"staleness_bound": 1}, (2 / 4, 1 / 4, 2 / 4)),
        ("ep", {}, (1, 1, 2)),
    ],
)
def test_a_rank_holds_what_its_algorithm_leaves_it(
    algorithm: str, cluster: dict[str, Any], expected: tuple[float, ...]
) -> None:
    assert held(algorithm, cluster=cluster) == tuple(round(part * WHOLE) for part in expected)


def test_sgd_has_no_state_and_fp64_is_twice_as_wide() -> None:
    assert held("single", training={"optimizer": "sgd"}) == (WHOLE, WHOLE, 0)
    assert held("single", training={"precision": "fp64"}) == (2 * WHOLE, 2 * WHOLE, 4 * WHOLE)
    assert held("single", training={"precision": "bf16"}) == (WHOLE * 3 // 2, WHOLE, 2 * WHOLE)


def test_a_server_holds_the_optimizer_and_computes_nothing() -> None:
    found = config({"type": "simple_nn"}, algorithm="syncps")
    assert estimate_memory(found, 4, is_server=True) == MemoryEstimate(WHOLE, WHOLE, 2 * WHOLE, 0)


def test_ep_spreads_the_experts_alone() -> None:
    model = {**SMALL_GPT, "type": "moe", "num_experts": 4}
    whole = parameter_count(config(model)) or 0
    estimate = estimate_memory(config(model, algorithm="ep"), 4)
    experts = 3 * 4 * 3 * 24 * 40
    assert estimate is not None
    assert estimate.weights == 4 * (whole - experts + experts // 4)


def test_smaller_parts_and_checkpointing_keep_fewer_activations() -> None:
    def activations(**training: Any) -> int:
        estimate = estimate_memory(config(SMALL_GPT, training={"batch_size": 8, **training}), 1)
        assert estimate is not None
        return estimate.activations

    assert activations(micro_batches=4) * 4 == activations()
    assert activations(precision="bf16") * 2 == activations()
    assert activations(activation_checkpointing=True) < activations()


# Long samples beside a narrow model: with dropout the attention scores are most of what is kept.
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [16, 128])
def test_the_activations_are_about_what_torch_keeps(dropout: float, tokens: int) -> None:
    sizes = {"vocab_size": 64, "model_dim": 64, "ff_dim": 256, "max_seq_len": tokens}
    found = config({**SMALL_GPT, **sizes, "dropout": dropout})
    module = build_model(found.model, seed=0, vocab_size=64)
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logits = module(torch.zeros(8, tokens, dtype=torch.int64))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(8 * tokens, dtype=torch.int64))
    for param in module.parameters():
        kept.pop(param.untyped_storage().data_ptr(), None)
    estimate = estimate_memory(config(found.model.model_dump(), training={"batch_size": 8}), 1)
    assert loss.isfinite()
    assert estimate is not None
    # An estimate: right about what to expect, not to the byte.
    assert 0.7 < estimate.activations / sum(kept.values()) < 1.5


class AtOnce(TorchDispatchMode):
    """Bytes that torch has made and not freed, now and at most; without those of the tensors that are counted apart."""

    def __init__(self, apart: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._apart or key in self._alive:
            return

        def forget(_reference: object) -> None:
            self.now -= nbytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize(("layers", "tokens", "dropout"), [(6, 128, 0.0), (6, 128, 0.1), (12, 32, 0.0)])
def test_with_checkpointing_they_are_about_what_torch_has_at_once(layers: int, tokens: int, dropout: float) -> None:
    sizes = {"vocab_size": 64, "model_dim": 64, "ff_dim": 256, "max_seq_len": tokens, "num_layers": layers}
    found = config(
        {**SMALL_GPT, **sizes, "dropout": dropout}, training={"batch_size": 8, "activation_checkpointing": True}
    )
    module = build_model(found.model, seed=0, vocab_size=64)
    checkpoint_activations(module)
    params = list(module.parameters())
    for param in params:
        param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params if param.grad is not None]
    inputs, targets = torch.zeros(8, tokens, dtype=torch.int64), torch.zeros(8 * tokens, dtype=torch.int64)
    with AtOnce(params + grads) as memory_of_torch:
        torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets).backward()
    estimate = estimate_memory(found, 1)
    assert estimate is not None
    # The same bounds as above.
    assert 0.7 < estimate.activations / memory_of_torch.peak < 1.5


# --- the warning


def test_check_warns_with_the_estimate_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "algorithm: classicdp\nmodel: {type: hf, hf_model_name: openai-community/gpt2}\ncluster:\n"
        "  memory: {a: 1.5, b: 64}\n  host_ip: {b: 10.0.0.1, a: 10.0.0.2}\n",
        encoding="utf-8",
    )
    (warning,) = check_file(file).warnings
    assert warning == (
        f"{file}:2: model hf needs about 6.9 GiB per rank (weights 0.5, gradients 0.5, optimizer 0.9, activations 5.1; "
        "classicdp over 2 ranks), but a has 1.5 GiB; lower training.batch_size or model.max_seq_len, or raise "
        "training.micro_batches"
    )


def test_training_is_warned_too_and_starts() -> None:
    found = load_config("demo", overrides=["cluster.memory=0.01"], environ={})
    assert [warning for warning in found.warnings if "needs about" in warning] == list(found.warnings) != []


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    large = config({"type": "hf", "hf_model_name": "gpt2", "max_seq_len": 16}, algorithm="classicdp")
    monkeypatch.setattr(memory, "machine_memory_bytes", lambda: 8 * GIB)
    assert memory.local_memory_warning(large, 2) is None
    warning = memory.local_memory_warning(large, 5)
    assert warning is not None
    assert warning.startswith("5 ranks of about 2.")
    assert "but this machine has 8.0 GiB" in warning


def test_machines_that_are_not_listed_are_as_large_as_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory_bytes", lambda: 3 * GIB)
    large = {"type": "hf", "hf_model_name": "gpt2"}
    hosts = {"host_ip": {"a": "10.0.0.1", "b": "10.0.0.2"}, "memory": {"a": 64}}
    warning = memory.memory_warning(config(large, algorithm="classicdp", cluster=hosts))
    assert warning is not None
    assert "b has 3.0 GiB" in warning
    warning = memory.memory_warning(config(large))
    assert warning is not None
    assert "this machine has 3.0 GiB" in warning


@pytest.mark.parametrize(
    ("algorithm", "sections", "remedy"),
    [
        ("classicdp", {"training": {"batch_size": 1}}, "divide its state with algorithm fsdp"),
        ("classicdp", {"training": {"batch_size": 1}, "cluster": {"staleness_bound": 4}}, "lower cluster.staleness"),
        ("classicdp", {"training": {"batch_size": 1, "optimizer": "sgd"}}, "take a smaller model"),
        ("classicdp", {"training": {"batch_size": 1}, "cluster": {"memory": 0.1}}, "take a smaller model"),
    ],
)
def test_the_remedy_is_for_the_largest_part(algorithm: str, sections: dict[str, Any], remedy: str) -> None:
    cluster = {"memory": 0.5, **sections.pop("cluster", {})}
    model = {"type": "hf", "hf_model_name": "gpt2", "max_seq_len": 16}
    warning = memory.memory_warning(config(model, algorithm=algorithm, cluster=cluster, **sections))
    assert warning is not None
    assert remedy in warning


@pytest.mark.parametrize(("stage", "expected"), [(0, 16.0), (1, 8 + 8 / 4), (2, 4 + 12 / 4), (3, 16 / 4)])
def test_fsdp_says_what_each_stage_needs(stage: int, expected: float) -> None:
    sizes = {"model_dim": 1024, "num_layers": 24, "num_heads": 16, "ff_dim": 4096, "max_seq_len": 16, "dropout": 0.0}
    found = config({"type": "gpt", "vocab_size": 50000, **sizes}, algorithm="fsdp", cluster={"fsdp_stage": stage})
    estimate, sizes_of = estimate_memory(found, 4), memory.model_sizes(found)
    assert estimate is not None
    assert sizes_of is not None
    held = estimate.weights + estimate.gradients + estimate.optimizer
    # Two blocks that are gathered, two matrices of gradients on their way; the embedding is gathered in pieces.
    more = (2 * 4 * sizes_of.block if stage == 3 else 0) + (2 * 4 * 4 * 1024 * 1024 * 1.01 if stage >= 2 else 0)
    assert held == pytest.approx(expected * sizes_of.parameters + more, rel=0.01)
    note = memory.stages_note(found, 4)
    assert note is not None
    assert f"{stage}: {estimate.total / memory.GIB:.2f} GiB (chosen)" in note
    assert memory.stages_note(config({"type": "simple_nn"}, algorithm="classicdp"), 4) is None
