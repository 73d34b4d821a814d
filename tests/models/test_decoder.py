"""The decoder gives what transformers gives, however sequences are cut, mixed and divided over stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.hf_folders import FAMILIES, TIME, VOCAB, make_hf_folder, transformers
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.decoder import Decoder, Segment
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.decoder_files import DecoderLoader
from smolcluster.models.tensor_files import TensorFiles

SLOTS = 3
BOUND = 1e-12


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with an untied head; Mistral's window is shorter than the texts."""
    return make_hf_folder(tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=False)


def load(
    folder: Path, cuts: Sequence[int] = (), dtype: torch.dtype = torch.float64, length: int = TIME
) -> list[Decoder]:
    """The whole model, in stages that begin at `cuts`."""
    config = read_decoder_config(folder)
    assert config is not None
    edges = [0, *cuts, config.num_layers + 2]
    with TensorFiles(folder) as files:
        return [
            DecoderLoader(config, dtype).load(files, range(begin, end), slots=SLOTS, length=length)
            for begin, end in itertools.pairwise(edges)
        ]


def run(stages: Sequence[Decoder], rows: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Logits of all rows."""
    for stage in stages:
        rows = stage(rows, segments, range(sum(segment.length for segment in segments)))
    return rows


def drawn_texts() -> Tensor:
    return torch.randint(VOCAB, (SLOTS, TIME), generator=torch.Generator().manual_seed(3))


def expected_logits(folder: Path, texts: Tensor) -> Tensor:
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits: Tensor = model(texts).logits
    return logits


@pytest.mark.parametrize("cuts", [(), (1,), (2,), (3,), (1, 2, 3)], ids=str)
def test_pieces_of_several_sequences_in_one_step_give_transformers_logits(folder: Path, cuts: tuple[int, ...]) -> None:
    texts, stages = drawn_texts(), load(folder, cuts)
    expected = expected_logits(folder, texts)
    # Sequence b lies in slot 2 - b; each step has another piece of each: a prompt's beginning, its middle, one token.
    ends = [[2, TIME - 1, TIME], [1, 4, TIME], [TIME - 2, TIME - 1, TIME]]
    begins = [0, 0, 0]
    for step in range(3):
        segments = [Segment(2 - b, begins[b], ends[b][step] - begins[b]) for b in range(SLOTS)]
        parts = [(b, slice(begins[b], ends[b][step])) for b in range(SLOTS)]
        found = run(stages, torch.cat([texts[b, part] for b, part in parts]), segments)
        torch.testing.assert_close(found, torch.cat([expected[b, part] for b, part in parts]), rtol=0, atol=BOUND)
        begins = [ends[b][step] for b in range(SLOTS)]


def test_token_by_token_gives_the_same_as_all_at_once(folder: Path) -> None:
    texts = drawn_texts()[:1]
    [decoder] = load(folder)
    found = torch.cat([run([decoder], texts[0, at : at + 1], [Segment(0, at, 1)]) for at in range(TIME)])
    torch.testing.assert_close(found, expected_logits(folder, texts)[0], rtol=0, atol=BOUND)


def test_a_slot_is_used_again_and_nothing_of_before_is_seen(folder: Path) -> None:
    texts = drawn_texts()
    [decoder] = load(folder)
    run([decoder], texts[0], [Segment(1, 0, TIME)])
    found = run([decoder], texts[1, :3], [Segment(1, 0, 3)])
    torch.testing.assert_close(found, expected_logits(folder, texts)[1, :3], rtol=0, atol=BOUND)


def test_only_wanted_rows_get_logits(folder: Path) -> None:
    texts = drawn_texts()
    [decoder] = load(folder)
    segments = [Segment(0, 0, TIME), Segment(1, 0, TIME)]
    found = decoder(texts[:2].flatten(), segments, [TIME - 1, 2 * TIME - 1])
    torch.testing.assert_close(found, expected_logits(folder, texts)[:2, -1], rtol=0, atol=BOUND)


@pytest.mark.parametrize("mistake", ["position", "stale", "mask"])
def test_broken_decoders_are_noticed(folder: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above are worth: each usual mistake moves the logits by more than they allow."""
    from smolcluster.models import decoder as module

    texts, [decoder] = drawn_texts(), load(folder)
    expected = expected_logits(folder, texts)[0]
    for slot in range(SLOTS):  # what memory holds by chance may be right
        run([decoder], texts[1], [Segment(slot, 0, TIME)])
    segments = [Segment(0, 0, 4), Segment(0, 4, TIME - 4)]
    if mistake == "position":
        plain = module._positions
        monkeypatch.setattr(module, "_positions", lambda segments, device: (plain(segments, device) + 1) % TIME)
    if mistake == "mask":
        monkeypatch.setattr(module, "_mask", lambda *_: None)
    if mistake == "stale":
        segments[1] = Segment(2, 4, TIME - 4)
    found = torch.cat([run([decoder], texts[0, :4], segments[:1]), run([decoder], texts[0, 4:], segments[1:])])
    assert not (found - expected).abs().max() < 1e-6


def note_reads(files: TensorFiles) -> list[str]:
    """The names of the tensors that are read from now on."""
    read: list[str] = []
    plain = files.chunks
    files.chunks = lambda name: (read.append(name), plain(name))[1]  # type: ignore[method-assign]
    return read


def test_a_stage_reads_only_what_is_its_own(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama", tie_word_embeddings=False)
    config = read_decoder_config(tmp_path)
    assert config is not None
    with TensorFiles(tmp_path) as files:
        read = note_reads(files)
        DecoderLoader(config, torch.float32).load(files, range(2, 3), slots=1, length=TIME)
        assert {name.split(".")[2] for name in read} == {"1"}
        assert len(read) == len([name for name in files.tensors if name.startswith("model.layers.1.")])


def test_a_tied_head_is_read_once(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "gpt2")
    config = read_decoder_config(tmp_path)
    assert config is not None
    with TensorFiles(tmp_path) as files:
        read = note_reads(files)
        whole = DecoderLoader(config, torch.float32).load(files, range(config.num_layers + 2), slots=1, length=TIME)
        assert len(read) == len(set(read))
        assert whole.entry is not None
        DecoderLoader(config, torch.float32).load(files, range(3, config.num_layers + 2), slots=1, length=TIME)


def test_a_missing_bias_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_hf_folder(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.c_fc\.bias"):
        load(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-5], content[:7], b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            TensorFiles(tmp_path)


def test_what_it_does_not_compute_is_none_and_nonsense_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "bert"}')
    assert read_decoder_config(tmp_path) is None
    file.write_text('{"model_type": "gpt2", "n_embd": 12}')
    with pytest.raises(ConfigError, match="n_layer"):
        read_decoder_config(tmp_path)
    file.write_text(
        '{"model_type": "gpt2", "n_embd": 12, "n_layer": 1, "n_head": 5, "vocab_size": 3, "n_positions": 4}'
    )
    with pytest.raises(ConfigError, match="multiple"):
        read_decoder_config(tmp_path)
