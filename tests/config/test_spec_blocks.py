"""The files that users have: every preset, and every block of the guide, is checked, resolved, built and run a step.

The guide lies beside the checkout; where it does not, the presets alone are run. Algorithms that this release does not
run are resolved, with their roles.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolcluster.cli import _run
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.config import memory
from smolcluster.config.hosts import rank_count, roles
from smolcluster.config.load import Resolved, load_config, preset_names
from smolcluster.config.schema import Config
from smolcluster.kinds import JsonObject
from smolcluster.run.support import PARAMETER_SERVERS

GUIDE = Path(os.environ.get("SMOLCLUSTER_SPEC", Path(__file__).parents[3] / "shared" / "spec"))
# Files that configure what is served; they train nothing.
FOR_SERVING = ("cluster_config_inference", "model_config_inference")
TRAINED = {
    "cluster_config_classicdp": "classicdp",
    "cluster_config_ddp": "classicdp",
    "nn_config": "single",
    "gpt_config": "single",
}


def blocks() -> Iterator[tuple[str, str, str]]:
    """(page, name of the file, text) of each configuration that stands on a page under a heading with its name."""
    for page in sorted(GUIDE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^### (\w+\.yaml).*?^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield page.name, found.group(1), found.group(2).replace('\\"', '"')


BLOCKS = list(blocks())
every_block = pytest.mark.parametrize(
    ("page", "name", "text"), BLOCKS, ids=[f"{page}:{name}" for page, name, _ in BLOCKS]
)
with_guide = pytest.mark.skipif(not BLOCKS, reason=f"the guide is not in {GUIDE}; SMOLCLUSTER_SPEC says where it is")


@pytest.fixture(autouse=True)
def a_large_machine_with_synthetic_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise in MNIST's files, and a text that repeats itself in WikiText's."""
    monkeypatch.setattr(memory, "machine_memory_bytes", lambda: 32 * memory.GIB)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SMOLCLUSTER_DATA", str(tmp_path / "data"))
    images, texts = tmp_path / "data" / "mnist", tmp_path / "data" / "wikitext-2"
    images.mkdir(parents=True)
    texts.mkdir()
    for part, count in (("train", 200), ("t10k", 10)):
        pixels = bytes(n * 7919 % 251 for n in range(count * 784))
        _write_idx(images / f"{part}-images-idx3-ubyte.gz", (count, 28, 28), pixels)
        _write_idx(images / f"{part}-labels-idx1-ubyte.gz", (count,), bytes(n % 10 for n in range(count)))
    for part, repeats in (("train", 400), ("valid", 30), ("test", 30)):
        (texts / f"{part}.txt").write_text(" the answer to everything is 42 .\n" * repeats, encoding="utf-8")


def _write_idx(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(gzip.compress(header + values, compresslevel=1))


def test_all_configurations_of_the_guide_are_found() -> None:
    if not BLOCKS:
        pytest.skip(f"the guide is not in {GUIDE}; SMOLCLUSTER_SPEC says where it is")
    names = [name for _, name, _ in BLOCKS]
    clusters = ("fsdp", "classicdp", "edp", "syncps", "mp", "inference")
    assert {f"cluster_config_{kind}.yaml" for kind in clusters} <= set(names)
    assert {"nn_config.yaml", "gpt_config.yaml", "model_config_inference.yaml"} <= set(names)
    assert sum(page.read_text(encoding="utf-8").count("```yaml") for page in GUIDE.glob("*.md")) == len(BLOCKS)


@with_guide
@every_block
def test_a_block_of_the_guide_passes_config_check(
    page: str, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert _run(["config", "check", str(file)], "smolcluster") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"{file}: ok"
    assert all(line.startswith("warning: ") for line in printed.out.splitlines()[:-1])
    assert printed.err == ""


@with_guide
@every_block
@pytest.mark.parametrize("option", ["--config", "--cluster"])
def test_a_block_of_the_guide_is_resolved_and_runs_where_this_release_can(
    page: str, name: str, text: str, option: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    kind = {"--config": "files", "--cluster": "cluster_files"}[option]
    resolved = load(**{kind: [file]})
    check_roles(resolved.config, file.stem)
    if option == "--config" and file.stem in TRAINED:
        assert resolved.config.algorithm == TRAINED[file.stem]
        run_a_step(resolved.config)


@with_guide
@every_block
def test_a_preset_of_the_guide_has_its_values(page: str, name: str, text: str, tmp_path: Path) -> None:
    if page != "configuration.md":
        pytest.skip("an earlier state of a file that configuration.md shows")
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert load(preset=file.stem).config == load(files=[file]).config


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_runs_a_step_where_this_release_can(preset: str, tmp_path: Path) -> None:
    overrides = []
    if preset.endswith("_llama"):
        overrides = [f"model.hf_model_name={tiny_llama(tmp_path / 'llama')}"]
    config = load(preset=preset, overrides=overrides).config
    check_roles(config, preset)
    if preset not in FOR_SERVING:
        run_a_step(config)


def load(overrides: list[str] | None = None, **sources: Any) -> Resolved:
    """With a tokenizer that needs no network, and a step to run."""
    fixed = ["training.max_steps=1", "training.device=cpu"]
    resolved = load_config(**sources, overrides=[*fixed, *(overrides or ())], environ={})
    if resolved.config.data.tokenizer == "openai-community/gpt2":
        return load_config(**sources, overrides=[*fixed, *(overrides or ()), "data.tokenizer=bytes"], environ={})
    return resolved


def check_roles(config: Config, name: str) -> None:
    """Every machine of the file has its part."""
    serves = name in FOR_SERVING
    if not config.cluster.host_ip and config.cluster.allToAllTopology is None:
        return
    found = roles(config, serves=serves)
    assert [member.rank for member in found] == list(range(len(found)))
    with_server = serves or config.algorithm in ("syncps", "edp", "mp")
    assert len(found) == (config.cluster.num_workers or 0) + with_server
    servers = [member.name for member in found if member.role == "server"]
    assert servers == ([config.cluster.server] if with_server else [])
    assert all(member.listens for member in found if member.role != "worker")
    assert all(member.dials in found[0].listens for member in found if member.role == "worker")


def run_a_step(config: Config) -> None:
    """Model, sampler, strategy and one update over the file's own number of ranks, as threads of this process."""
    from smolcluster.run.build import prepare
    from smolcluster.run.session import run_rank
    from smolcluster.training.role import RunContext

    world_size = 1 if config.algorithm == "single" else max(2, rank_count(config))
    names = [f"rank{rank}" for rank in range(world_size)]

    class NoRows:
        def write(self, row: JsonObject) -> None:
            pass

        def progress(self, done: int, total: int, row: JsonObject) -> None:
            pass

    # One after the other: transformers turns global switches while it loads a model, and ranks are threads here.
    parts = [prepare(config, rank, names) for rank in range(world_size)]

    if config.algorithm in PARAMETER_SERVERS:
        check_step(run_over_a_server(config, parts, names, NoRows))
        return

    def run(comm: LocalCommunicator) -> JsonObject:
        return run_rank(parts[comm.rank], comm, RunContext(NoRows(), comm, threading.Event())).run

    first, *others = LocalGroup(world_size).run(run)
    check_step(first)
    assert all(other["weights_sha256"] == first["weights_sha256"] for other in others)


def check_step(run: JsonObject) -> None:
    assert run["steps"] == 1
    assert isinstance(run["train_loss"], float)
    assert 0 < run["train_loss"] < 10


def run_over_a_server(config: Config, parts: list[Any], names: list[str], sink: Any) -> JsonObject:
    """A server and its workers as threads of this process."""
    from smolcluster.run.param_server import run_server, run_worker
    from smolcluster.training.role import RunContext
    from smolcluster.transport.inproc import InprocNetwork

    network = InprocNetwork()
    listener = network.listen("server", 0)

    def work(rank: int) -> None:
        run_worker(
            parts[rank], network, lambda: listener.address, names[rank], RunContext(sink(), None, threading.Event()),
            run_id="", address="", options={},
        )  # fmt: skip

    workers = [threading.Thread(target=work, args=(rank,), name=names[rank]) for rank in range(1, len(names))]
    for worker in workers:
        worker.start()
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(sink(), None, threading.Event())
        result = run_server(parts[0], [listener], names, context, options={}, folder=Path(folder))
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    return result.run


def tiny_llama(folder: Path) -> Path:
    """A random model of Llama's kind, in a folder as transformers writes it, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    described = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(described).save_pretrained(folder)
    return folder
