"""Models of transformers in our loop: the numbers of a plain loop, tied weights once, nothing executed or guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.equality import Case, Outcome, run_classicdp
from models.hf_folders import FAMILIES, TIME, VOCAB, hf_config, make_hf_folder, transformers
from smolcluster import hub
from smolcluster.algorithms.single import Single
from smolcluster.config.schema import ModelConfig
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.data.sampler import split_by_shares
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.build import build_model, restore_model
from smolcluster.models.hf import HFModel
from smolcluster.models.weights import exported_tensors, weights_sha256
from smolcluster.training.optim import optimizer_factory

pytestmark = pytest.mark.usefixtures("few_threads")
STEPS, GLOBAL_BATCH, LEARNING_RATE, WEIGHT_DECAY, CLIP = 10, 6, 3e-3, 0.1, 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {family: make_hf_folder(root / family, family) for family in FAMILIES}


@pytest.fixture
def few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def section(folder: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"type": "hf", "hf_model_name": str(folder), "max_seq_len": TIME, **changes})


def load(folder: Path, **changes: Any) -> HFModel:
    model = build_model(section(folder, init="pretrained", **changes), seed=0, vocab_size=VOCAB)
    assert isinstance(model, HFModel)
    return model


def padded_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, targets, mask) of each step, (GLOBAL_BATCH, TIME); texts of 3 to TIME tokens, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        windows = torch.randint(0, VOCAB, (GLOBAL_BATCH, TIME + 1), generator=generator)
        lengths = torch.randint(3, TIME + 1, (GLOBAL_BATCH, 1), generator=generator)
        mask = torch.arange(TIME) < lengths
        inputs = windows[:, :-1].masked_fill(~mask, 0)
        steps.append((inputs, windows[:, 1:].masked_fill(~mask, NO_TARGET), mask))
    return steps


def plain_loop(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The loop of transformers' own examples: a mask, labels of -100, a mean loss. Losses and weights."""
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=False)
    losses = []
    for inputs, labels, mask in padded_batches():
        optimizer.zero_grad()
        logits = model(input_ids=inputs, attention_mask=mask.long()).logits
        loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def assert_same(outcome: Outcome, losses: list[float], weights: dict[str, Tensor]) -> None:
    # The bound; only the order of additions differs.
    assert [result.loss for result in outcome.results] == pytest.approx(losses, rel=0, abs=1e-11)
    assert outcome.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(outcome.weights[name], tensor, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_equal_a_plain_transformers_loop(family: str, folders: dict[str, Path]) -> None:
    losses, weights = plain_loop(folders[family])
    strategy = Single(
        load(folders[family]),
        optimizer_factory("adamw", LEARNING_RATE, WEIGHT_DECAY),
        precision="fp64",
        grad_clip_norm=CLIP,
    )
    # In two unequal parts: the gradient is that of the mean over all targets all the same.
    results = [
        strategy.train_step([Batch(inputs[:2], targets[:2]), Batch(inputs[2:], targets[2:])])
        for inputs, targets, _ in padded_batches()
    ]
    assert_same(Outcome([r for r in results if r], strategy.model.state_dict()), losses, weights)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral"])
def test_ten_steps_over_two_ranks_equal_it_too(family: str, folders: dict[str, Path]) -> None:
    losses, weights = plain_loop(folders[family])
    steps = padded_batches()

    def rank_batches(step: int, rank: int, world_size: int) -> list[Batch]:
        inputs, targets, _ = steps[step]
        planned = int((targets != NO_TARGET).sum())
        part = torch.arange(GLOBAL_BATCH).split(split_by_shares(GLOBAL_BATCH, [2.0, 1.0]))[rank]
        return [Batch(inputs[part], targets[part], planned)]

    def make(model: nn.Module, comm: Any, case: Case) -> Any:
        from smolcluster.algorithms.classicdp import ClassicDP

        factory = optimizer_factory("adamw", LEARNING_RATE, WEIGHT_DECAY)
        return ClassicDP(model, factory, comm, precision="fp64", grad_clip_norm=CLIP, bucket_bytes=2048)

    # Each rank from other weights: rank 0's are broadcast.
    built = {0: load(folders[family]), 1: build_model(section(folders[family]), seed=1)}
    outcomes = run_classicdp(Case(build=built.__getitem__, steps=STEPS), 2, make, rank_batches)
    for outcome in outcomes:
        assert_same(outcome, losses, weights)
    assert outcomes[0].results == outcomes[1].results


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_needs_no_mask(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family]).double().eval()
    eager = transformers().AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, attn_implementation="eager"
    )
    for inputs, _, mask in padded_batches()[:2]:
        with torch.no_grad():
            ours = model(inputs)
            masked = model.inner(input_ids=inputs, attention_mask=mask.long()).logits
            written_out = eager(input_ids=inputs, attention_mask=mask.long()).logits
            other_padding = model(inputs.masked_fill(~mask, 7))
        torch.testing.assert_close(ours[mask], masked[mask], rtol=0, atol=1e-12)
        torch.testing.assert_close(other_padding[mask], ours[mask], rtol=0, atol=1e-12)
        # float32: in float64 its softmax, which is float32 all the same, overflows where everything is masked
        torch.testing.assert_close(written_out[mask].double(), ours[mask], rtol=0, atol=1e-5)


def test_padding_brings_no_advice_to_pass_a_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(make_hf_folder(tmp_path, "gpt2", pad_token_id=0))
    logger = transformers().logging.get_logger("transformers.modeling_utils")
    logger.warning_once.cache_clear()  # said once a process
    logger.addHandler(caplog.handler)
    try:
        model(torch.zeros(1, TIME, dtype=torch.int64))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_hugging_faces_and_tied_weights_count_once(family: str, folders: dict[str, Path]) -> None:
    theirs = transformers().AutoModelForCausalLM.from_pretrained(folders[family])
    ours = load(folders[family])
    assert list(exported_tensors(ours)) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    embedding, head = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert (embedding is head) == (family != "mistral")
    assert weights_sha256(ours) == weights_sha256(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_depend_on_seed_and_module_name_only(family: str, folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(section(folders[family]), seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left alone"
    torch.manual_seed(2)
    assert weights_sha256(build_model(section(folders[family]), seed=3)) == weights_sha256(first)
    assert weights_sha256(build_model(section(folders[family]), seed=4)) != weights_sha256(first)

    # A deeper model begins with the same layers, though everything else is built at another time.
    deep = json.loads((folders[family] / "config.json").read_text())
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    assert isinstance(first, HFModel)
    deeper = type(first.inner.config)(**{**deep, key: 3, "layer_types": None, "initializer_range": 0.02})
    tensors = _random(deeper, 3)
    same = {name for name, tensor in first.state_dict().items() if torch.equal(tensors[name], tensor)}
    # GPT-2 narrows what writes to the residual stream by the number of layers.
    differ = {name for name in first.state_dict() if name.endswith("c_proj.weight")} if family == "gpt2" else set()
    assert same == set(first.state_dict()) - differ


def _random(config: Any, seed: int) -> dict[str, Tensor]:
    from smolcluster.models.hf import init_hf_parameters

    with torch.random.fork_rng():
        inner = transformers().AutoModelForCausalLM.from_config(config)
        init_hf_parameters(inner, seed)
    return dict(inner.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_distributed_as_transformers_has_it(family: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 96, "n_inner": 384} if family == "gpt2" else {"hidden_size": 96, "intermediate_size": 384}
    config = hf_config(family, **sizes, vocab_size=300)
    config.save_pretrained(tmp_path)
    ours = build_model(section(tmp_path), seed=0).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = transformers().AutoModelForCausalLM.from_config(config).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.std() == 0:
            assert torch.equal(ours[name], tensor), name
        else:
            # the smallest has 768 draws: 15 % is more than 4 of its deviations
            assert ours[name].std() / tensor.std() == pytest.approx(1, abs=0.15), name


def test_a_run_in_float64_gives_its_bits_back(folders: dict[str, Path]) -> None:
    strategy = Single(load(folders["llama"]), optimizer_factory("adamw", 1e-3, 0.0), precision="fp64")
    inputs, targets, _ = padded_batches()[0]
    strategy.train_step([Batch(inputs, targets)])
    state = {name: tensor.clone() for name, tensor in strategy.model.state_dict().items()}
    restored = restore_model(section(folders["llama"], init="pretrained"), state, origin=Path("x"))
    assert weights_sha256(restored) == weights_sha256(strategy.model)
    assert torch.equal(restored.eval()(inputs), strategy.model.eval()(inputs))


def test_half_precision_computes_and_keeps_float32_weights(folders: dict[str, Path]) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        strategy = Single(load(folders["qwen3"]), optimizer_factory("adamw", 1e-3, 0.0), precision=precision)
        inputs, targets, _ = padded_batches()[0]
        result = strategy.train_step([Batch(inputs, targets)])
        assert result is not None
        losses[precision] = result.loss
        assert {param.dtype for param in strategy.model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_weights_stored_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama", dtype="bfloat16")
    model = transformers().AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert {param.dtype for param in ours.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.float()), name


def test_training_and_evaluation_reach_the_model_inside(folders: dict[str, Path]) -> None:
    model = load(folders["gpt2"])
    assert model.training
    assert model.inner.training
    model.eval()
    assert not model.inner.training
    assert not model.inner.transformer.training


def test_it_writes_on_like_the_likeliest_token(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    tokens = padded_batches()[0][0][:2, :4]
    expected = tokens
    for _ in range(TIME):  # past the limit: the context is its last TIME tokens
        expected = torch.cat([expected, model.eval()(expected[:, -TIME:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.train().generate(tokens, TIME, temperature=0.0), expected)
    assert model.training


# --- what is refused


def test_sizes_that_do_not_fit_are_errors_that_name_the_key(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=rf"model.max_seq_len is 13, but the model in .* at most {TIME}"):
        load(folders["llama"], max_seq_len=13)
    with pytest.raises(ConfigError, match=rf"the tokenizer has 24 ids, .* has {VOCAB}. Set data.tokenizer"):
        build_model(section(folders["llama"]), seed=0, vocab_size=24)
    with pytest.raises(ConfigError, match=r"a sequence of 13 tokens is longer than the model's limit of 12"):
        load(folders["gpt2"])(torch.zeros(1, 13, dtype=torch.int64))


def test_a_model_that_sees_the_next_token_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = transformers().BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=TIME)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\(bert\) reads texts in both directions"):
        build_model(section(tmp_path), seed=0)
    config.is_decoder = True
    config.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    first, second = build_model(section(tmp_path), seed=0).eval()(tokens)
    torch.testing.assert_close(first[:2], second[:2])


def test_code_in_a_folder_is_never_executed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "foreign")
    mark = tmp_path / "executed"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass A: ...\n")
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A"}}
    (folder / "config.json").write_text(json.dumps(content))
    for init in ("random", "pretrained"):
        with pytest.raises(ConfigError, match=r"never executed") as caught:
            build_model(section(folder, init=init), seed=0)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_pickled_weights_are_refused_unread(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"Python pickles only, .* never loaded"):
        load(folder)
    assert isinstance(build_model(section(folder), seed=0), HFModel), "random weights need none"


def test_damaged_or_foreign_folders_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        return shutil.copytree(folders["llama"], tmp_path / name)

    cut = changed("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut.model\.safetensors cannot be read"):
        load(cut)

    from safetensors.torch import load_file, save_file

    lacking = changed("lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the model's tensors \(first: model\.layers\.1\.mlp\.up_proj"
    ):
        load(lacking)

    other_sizes = changed("sizes")
    content = json.loads((other_sizes / "config.json").read_text())
    (other_sizes / "config.json").write_text(json.dumps(content | {"intermediate_size": 24}))
    with pytest.raises(ConfigError, match="cannot build") as caught:
        load(other_sizes)
    assert "\n" not in str(caught.value)

    no_json = changed("no_json")
    (no_json / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot build"):
        load(no_json)

    quantized = changed("quantized")
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (quantized / "config.json").write_text(json.dumps(content | quantization))
    with pytest.raises(ConfigError, match="is quantized"):
        load(quantized)

    encoder = changed("encoder")
    (encoder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ConfigError, match="cannot build a causal language model"):
        load(encoder)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="there is no such folder"):
        load(tmp_path / "nowhere")


def test_without_the_extra_the_error_names_it(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'model\.type hf needs transformers .* pip install "smolcluster\[hf\]"'):
        build_model(section(folders["llama"]), seed=0)


# --- ids


class FakeHub:
    """What of huggingface_hub is used."""

    constants = SimpleNamespace(ENDPOINT="https://hub.example", HF_HUB_OFFLINE=False)

    def __init__(self, folder: Path, *, is_cached: bool) -> None:
        self._folder = folder
        self._is_cached = is_cached
        self.downloads: list[tuple[str, list[str]]] = []

    def snapshot_download(self, name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only and not self._is_cached:
            raise FileNotFoundError("not in the cache")
        if not local_files_only:
            self.downloads.append((name, allow_patterns))
        return str(self._folder)


def use_hub(monkeypatch: pytest.MonkeyPatch, fake: FakeHub, unreachable: str | None = None) -> None:
    real = hub.import_extra
    monkeypatch.setattr(hub, "import_extra", lambda name, *a: fake if name == "huggingface_hub" else real(name, *a))
    monkeypatch.setattr(hub, "why_unreachable", lambda url: unreachable)


def test_a_cached_id_needs_no_network(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(folders["llama"], is_cached=True)
    use_hub(monkeypatch, fake, unreachable="no route")
    model = build_model(section("some-org/llama", init="pretrained"), seed=0)
    assert weights_sha256(model) == weights_sha256(load(folders["llama"]))
    assert fake.downloads == []


def test_an_id_is_downloaded_with_safetensors_only(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(folders["llama"], is_cached=False)
    use_hub(monkeypatch, fake)
    build_model(section("some-org/llama", init="pretrained"), seed=0)
    build_model(section("some-org/llama"), seed=0)
    (_, with_weights), (_, without) = fake.downloads
    assert set(with_weights) - set(without) == {
        "model.safetensors",
        "model.safetensors.index.json",
        "model-*.safetensors",
    }
    assert not any("safetensors" in pattern for pattern in without)


def test_a_missing_network_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, FakeHub(folders["llama"], is_cached=False), unreachable="Name or service not known")
    with pytest.raises(ConfigError, match=r"hub\.example cannot be reached \(Name or service not known\)") as caught:
        build_model(section("some-org/llama"), seed=0)
    assert "\n" not in str(caught.value)


def test_a_cache_that_lacks_a_shard_is_downloaded_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers().AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weights_sha256(load(tmp_path)) == weights_sha256(load(folders["llama"]))
    shards[0].rename(tmp_path / "away")
    fake = FakeHub(tmp_path, is_cached=True)
    use_hub(monkeypatch, fake)
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_model(section("some-org/llama", init="pretrained"), seed=0)
    assert len(fake.downloads) == 1


def test_nobody_listening_is_noticed_and_an_answer_of_any_kind_counts() -> None:
    import socket
    import threading

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "refused" in str(hub.why_unreachable(f"http://127.0.0.1:{port}")).lower()

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert hub.why_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is None
        thread.join(10)


def test_a_name_that_cannot_be_looked_up_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    end = threading.Event()
    ended = threading.Event()

    def ask(url: str) -> str | None:  # the system's look-up takes its time, whatever limit is asked for
        end.wait(20)
        ended.set()
        return None

    monkeypatch.setattr(hub, "_ask", ask)
    monkeypatch.setattr(hub, "REACH_TIMEOUT", 0.05)
    try:
        assert hub.why_unreachable("https://example.invalid") == "no answer within 0.05 s"
    finally:
        end.set()
        assert ended.wait(20)
