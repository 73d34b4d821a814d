"""Families that decoder.py does not compute give transformers' logits too, however they are cut, mixed and divided."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.hf_folders import OTHER_FAMILIES, make_other_folder, transformers, whole_model
from smolcluster import hub
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models import hf_cache
from smolcluster.models.decoder import Segment
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.hf_decoder import HfDecoder
from smolcluster.models.hf_decoder_files import HfLoader, read_hf_config
from smolcluster.models.linear import WeightKind
from smolcluster.models.tensor_files import TensorFiles

pytestmark = pytest.mark.usefixtures("softmax_in_float64")
SLOTS, TIME, VOCAB, LAYERS = 3, 24, 64, 7
BOUND = 1e-9


@pytest.fixture
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models compute attention's softmax in float32, whose rounding depends on how many keys there are."""
    plain = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return plain(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other_folder(tmp_path_factory.mktemp("phi3"), "phi3")


def load(
    folder: Path, cuts: Sequence[int] = (), loader: HfLoader | None = None, dtype: torch.dtype = torch.float64
) -> list[HfDecoder]:
    """The whole model, in stages that begin at `cuts`."""
    loader = loader or HfLoader(folder, dtype)
    edges = [0, *cuts, loader.layers]
    with TensorFiles(folder) as files:
        return [loader.load(files, range(a, b), slots=SLOTS, length=TIME) for a, b in itertools.pairwise(edges)]


def run(stages: Sequence[HfDecoder], rows: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Logits of all rows."""
    for stage in stages:
        rows = stage(rows, segments, range(sum(segment.length for segment in segments)))
    return rows


def drawn_texts() -> Tensor:
    return torch.randint(VOCAB, (SLOTS, TIME), generator=torch.Generator().manual_seed(3))


def expected_logits(folder: Path, texts: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        logits: Tensor = whole_model(folder, dtype)(texts, use_cache=False).logits
    return logits


def check_pieces(stages: Sequence[HfDecoder], texts: Tensor, expected: Tensor, ends: list[list[int]]) -> None:
    """Sequence b lies in slot 2 - b; each step has another piece of each."""
    begins = [0] * SLOTS
    for step in range(len(ends[0])):
        parts = [(b, slice(begins[b], ends[b][step])) for b in range(SLOTS) if ends[b][step] > begins[b]]
        segments = [Segment(2 - b, part.start, part.stop - part.start) for b, part in parts]
        found = run(stages, torch.cat([texts[b, part] for b, part in parts]), segments)
        torch.testing.assert_close(found, torch.cat([expected[b, part] for b, part in parts]), rtol=0, atol=BOUND)
        begins = [ends[b][step] for b in range(SLOTS)]


def test_pieces_of_several_sequences_in_one_step_give_transformers_logits(folder: Path) -> None:
    texts = drawn_texts()
    # A prompt's beginning, its middle, one token; and the last one of a text that others have left.
    ends = [[2, TIME - 1, TIME, TIME], [1, 9, 10, TIME], [TIME - 2, TIME - 1, TIME, TIME]]
    check_pieces(load(folder), texts, expected_logits(folder, texts), ends)


def test_every_split_over_up_to_four_stages_gives_the_same(folder: Path) -> None:
    texts, loader = drawn_texts(), HfLoader(folder, torch.float64)
    expected = expected_logits(folder, texts)
    assert loader.layers == LAYERS
    ends = [[9, 10], [10, TIME], [1, 2]]
    for count in range(1, 4):
        for cuts in itertools.combinations(range(1, LAYERS), count):
            check_pieces(load(folder, cuts, loader), texts, expected, ends)


def test_token_by_token_gives_the_same_as_all_at_once(folder: Path) -> None:
    texts = drawn_texts()[:1]
    stages = load(folder)
    found = torch.cat([run(stages, texts[0, at : at + 1], [Segment(0, at, 1)]) for at in range(TIME)])
    torch.testing.assert_close(found, expected_logits(folder, texts)[0], rtol=0, atol=BOUND)


@pytest.mark.parametrize("common", [0, 5, TIME - 1])
def test_a_slot_goes_on_from_a_shorter_prefix_and_nothing_of_before_is_seen(folder: Path, common: int) -> None:
    texts, stages = drawn_texts(), load(folder, (3,))
    text = torch.cat([texts[0, :common], texts[1, common:]])
    run(stages, texts[0], [Segment(1, 0, TIME)])
    found = run(stages, text[common:], [Segment(1, common, TIME - common)])
    torch.testing.assert_close(found, expected_logits(folder, text[None])[0, common:], rtol=0, atol=BOUND)


def test_only_wanted_rows_get_logits(folder: Path) -> None:
    texts, [decoder] = drawn_texts(), load(folder)
    expected = expected_logits(folder, texts)
    segments = [Segment(slot, 0, TIME) for slot in range(SLOTS)]
    found = decoder(texts.flatten(), segments, [TIME - 1, 3 * TIME - 2, 3 * TIME - 1])
    wanted = torch.stack([expected[0, -1], expected[2, -2], expected[2, -1]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=BOUND)
    assert decoder(texts[:1].flatten(), segments[:1], []).shape == (0, VOCAB)


@pytest.mark.parametrize("mistake", ["position", "stale", "mask"])
def test_broken_decoders_are_noticed(folder: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above are worth: each usual mistake moves the logits by more than they allow."""
    texts, stages = drawn_texts(), load(folder)
    expected = expected_logits(folder, texts)[0]
    for slot in range(SLOTS):
        run(stages, texts[1], [Segment(slot, 0, TIME)])
    kind: Any = hf_cache._slot_cache_class()
    segments = [Segment(0, 0, 9), Segment(0, 9, TIME - 9)]
    sizes = kind.get_mask_sizes
    if mistake == "position":
        monkeypatch.setattr(kind, "get_mask_sizes", lambda self, count, layer: (self._start + count, 0))
        monkeypatch.setattr(kind, "get_seq_length", lambda self, layer=0: max(0, self._start - 1))
    if mistake == "mask":  # the keys are thought to be one position on
        monkeypatch.setattr(kind, "get_mask_sizes", lambda self, *given: (sizes(self, *given)[0], 1))
    if mistake == "stale":
        segments[1] = Segment(2, 9, TIME - 9)
    try:
        found = torch.cat([run(stages, texts[0, :9], segments[:1]), run(stages, texts[0, 9:], segments[1:])])
    except RuntimeError:  # a mask of another shape than the keys
        return
    assert not (found - expected).abs().max() < 1e-4


def note_bytes(files: TensorFiles) -> list[int]:
    """How many bytes each read has from now on."""
    read: list[int] = []
    plain = files._read_into

    def noting(file: Path, begin: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        plain(file, begin, buffer)

    files._read_into = noting  # type: ignore[method-assign]
    return read


def test_a_stage_reads_and_holds_only_what_is_its_own(folder: Path) -> None:
    loader = HfLoader(folder, torch.float64)
    with TensorFiles(folder) as files:
        read = note_bytes(files)
        stage = loader.load(files, range(2, 4), slots=1, length=TIME)
        own = [name for name in files.tensors if {"1", "2"} & {*name.split(".")[:4]}]
        assert sum(read) == sum(files.tensors[name].nbytes for name in own)
        held = sum(p.numel() for p in stage._inner.parameters())
        assert (
            held
            == sum(files.tensors[name].nbytes for name in own) // 8
            == sum(cost.parameters for cost in loader.costs()[2:4])
        )
        # Another split reads what is new to it.
        read.clear()
        loader.load(files, range(3, 5), slots=1, length=TIME)
        own = [name for name in files.tensors if "3" in name.split(".")[:4]]
        assert sum(read) == sum(files.tensors[name].nbytes for name in own)


def test_a_tied_head_is_read_once_and_by_each_stage_that_uses_it(tmp_path: Path) -> None:
    make_other_folder(tmp_path, "gemma2", tie_word_embeddings=True)
    texts, loader = drawn_texts(), HfLoader(tmp_path, torch.float64)
    expected = expected_logits(tmp_path, texts)
    with TensorFiles(tmp_path) as files:
        read = note_bytes(files)
        loader.load(files, range(LAYERS), slots=1, length=TIME)
        assert sum(read) == sum(stored.nbytes for stored in files.tensors.values())
    for cuts in [(), (1,), (LAYERS - 1,), (2, 4)]:
        check_pieces(load(tmp_path, cuts, loader), texts, expected, [[9, TIME]] * SLOTS)


@pytest.mark.parametrize(("name", "dtype", "bound"), [("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.2)])
def test_smaller_dtypes_give_transformers_logits_in_them(
    folder: Path, name: str, dtype: torch.dtype, bound: float
) -> None:
    """Loose where a rounding of 2^-8 decides for another expert or passes many layers; scales show at once."""
    texts = drawn_texts()
    expected = expected_logits(folder, texts, dtype).float()
    stages = load(folder, (3,), dtype=dtype)
    found = run(stages, texts[0], [Segment(0, 0, TIME)]).float()
    assert (found - expected[0]).norm() < bound * expected[0].norm()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_products_of_integers_are_near_those_of_floats(phi3: Path, kind: WeightKind) -> None:
    texts = drawn_texts()
    expected = expected_logits(phi3, texts, torch.float32)[0]
    loader = HfLoader(phi3, torch.float32, kind)
    for cuts in [(), (3,)]:
        stages = load(phi3, cuts, loader)
        found = run(stages, texts[0], [Segment(0, 0, TIME)])
        assert 1e-6 < (found - expected).norm() / expected.norm() < 0.1


def test_integers_are_refused_where_most_weights_are_in_no_linear_layer(tmp_path: Path) -> None:
    make_other_folder(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match="--dtype int8"):
        HfLoader(tmp_path, torch.float32, "int8")


def test_experts_are_one_tensor_of_many_in_the_file(tmp_path: Path) -> None:
    """What the tests of all families rely on: the files have names that the model has not."""
    make_other_folder(tmp_path, "mixtral", num_local_experts=12)
    with TensorFiles(tmp_path) as files:
        assert sum(".experts.11." in name for name in files.tensors) == 5 * 3
    texts = drawn_texts()
    check_pieces(load(tmp_path), texts, expected_logits(tmp_path, texts), [[9, TIME]] * SLOTS)


def test_costs_and_the_cache_are_those_of_the_model(folder: Path) -> None:
    loader = HfLoader(folder, torch.float64)
    costs = loader.costs()
    assert len(costs) == LAYERS
    assert all(cost.time > costs[0].time for cost in costs[1:])
    [decoder] = load(folder, loader=loader)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoder._cache.layers)
    assert kept == loader.bytes_per_position() * SLOTS * TIME
    assert (loader.config.vocab_size, loader.config.max_positions) == (VOCAB, 96)


def test_our_decoder_has_no_such_folder(folder: Path) -> None:
    assert read_decoder_config(folder) is None


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 9}, "keys and values"),
        ("RwkvConfig", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 9}, "keys and values"),
        ("BartConfig", {"d_model": 16, "decoder_layers": 1, "vocab_size": 9}, "encoder"),
        ("BertConfig", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "both directions"),
    ],
)
def test_what_keeps_something_else_is_refused(tmp_path: Path, kind: str, sizes: dict[str, Any], words: str) -> None:
    library = transformers()
    library.AutoModelForCausalLM.from_config(getattr(library, kind)(**sizes)).save_pretrained(tmp_path)
    getattr(library, kind)(**sizes).save_pretrained(tmp_path)  # as of the model with its encoder
    with pytest.raises(ConfigError, match=words):
        HfLoader(tmp_path, torch.float32)


def test_what_cannot_be_cut_is_served_in_one_process_only(tmp_path: Path) -> None:
    library = transformers()
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 20, "num_key_value_heads": 1, "head_dim": 8}
    config = library.Llama4TextConfig(vocab_size=VOCAB, pad_token_id=None, **sizes, **experts)
    torch.manual_seed(1)
    model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    loader, texts = HfLoader(tmp_path, torch.float64), drawn_texts()
    assert loader.layers == 4
    # Its routers compute in float32.
    torch.testing.assert_close(
        run(load(tmp_path, (), loader), texts[0], [Segment(0, 0, TIME)]),
        expected_logits(tmp_path, texts)[0],
        rtol=0,
        atol=1e-5,
    )
    for refused in (loader.costs, lambda: load(tmp_path, (2,), loader)):
        with pytest.raises(ConfigError, match="leave --local"):
            refused()


def test_files_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_other_folder(tmp_path, "stablelm") / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ConfigError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight.*cannot be served yet"):
        HfLoader(tmp_path, torch.float32)
    save_file({**tensors, name: tensors[name][:3].clone()}, file)
    with pytest.raises(ConfigError, match=r"up_proj\.weight .*shape \(3, 32\)"):
        HfLoader(tmp_path, torch.float32)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="ends early"):
        HfLoader(tmp_path, torch.float32)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickles"):
        HfLoader(tmp_path, torch.float32)


def test_experts_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_other_folder(tmp_path, "mixtral") / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if ".layers.2." in name and ".experts.3." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\..*experts"):
        HfLoader(tmp_path, torch.float32)


def test_code_and_quantized_weights_are_refused(tmp_path: Path) -> None:
    make_other_folder(tmp_path, "stablelm")
    change_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="quantized"):
        HfLoader(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(ConfigError, match="never executed"):
        HfLoader(tmp_path, torch.float32)


def test_without_transformers_the_extra_is_named(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"phi3, needs transformers .*smolcluster\[hf\]"):
        HfLoader(phi3, torch.float32)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_whose_frequencies_change_end_where_they_do(tmp_path: Path, kind: str) -> None:
    """What was kept with the old frequencies would not fit the new ones."""
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": TIME}
    scaling |= {"factor": 4.0} if kind == "dynamic" else {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    make_other_folder(tmp_path, "stablelm", rope_scaling=scaling, partial_rotary_factor=1.0)
    assert read_hf_config(tmp_path)[1].max_positions == TIME
    texts = drawn_texts()
    check_pieces(load(tmp_path), texts, expected_logits(tmp_path, texts), [[9, TIME]] * SLOTS)
