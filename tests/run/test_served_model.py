"""Which model is served, and where its files come from."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from models.hf_folders import trained_folder
from run.files_server import FakeHub, FilesServer
from smolcluster import hub
from smolcluster.config.schema import ServingConfig
from smolcluster.config.weights import WeightsSource, find_weights
from smolcluster.errors import ConfigError
from smolcluster.run import served_model
from smolcluster.run.serve import make_service, write_on
from smolcluster.run.served_model import Choice, ServedModel, choose_model, find_model, note_stages
from smolcluster.serving.service import Wishes

CONFIG = json.dumps({"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 9, "n_positions": 8})
WEIGHTS = save({"x": np.arange(7, dtype=np.float32)})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
GPT2 = "openai-community/gpt2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMOLCLUSTER_DATA", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake, real = FakeHub(), hub.import_extra
    monkeypatch.setattr(hub, "import_extra", lambda name, *a: fake if name == "huggingface_hub" else real(name, *a))
    monkeypatch.setattr(hub, "why_unreachable", lambda url: None)
    return fake


@pytest.fixture
def server() -> Iterator[FilesServer]:
    with FilesServer().running() as running:
        running.files["/gpt/model.safetensors"] = WEIGHTS
        yield running


def model_folder(path: Path, *, weights: bytes | None = WEIGHTS) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(CONFIG)
    (path / "tokenizer.json").write_text("{}")
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def model_file(folder: Path, **models: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "models.yaml"
    file.write_text(json.dumps(models))  # JSON is YAML
    return file


def choose(model: str | None = None, *files: Path, said: list[str] | None = None, **overrides: object) -> Choice:
    texts = [f"serving.{key}={json.dumps(value)}" for key, value in overrides.items()]
    return choose_model(model, (said if said is not None else []).append, files=files, overrides=texts)


def find(model: str | None = None, *files: Path, said: list[str] | None = None, **overrides: object) -> ServedModel:
    choice = choose(model, *files, said=said, **overrides)
    return find_model(choice, (said if said is not None else []).append, urllib.request.build_opener())


def use_table(monkeypatch: pytest.MonkeyPatch, **entries: str | None) -> None:
    """A table with `mine`; a local server's address would not be read from a file, which may have https alone."""
    source = WeightsSource.model_construct(**{"hf_model_name": None, "url": None, "revision": None, "sha256": None})
    source = source.model_copy(update=entries)
    monkeypatch.setattr(served_model, "find_weights", lambda key: source if key == "mine" else find_weights(key))


# --- what --model may be


def test_a_key_chooses_the_model_of_a_file(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    file = model_file(
        tmp_path / "etc",
        small={"hf_model_name": str(first), "max_new_tokens": 5},
        large={"hf_model_name": str(second), "max_new_tokens": 7},
    )
    said: list[str] = []
    assert choose("large", file, said=said).config.serving.max_new_tokens == 7
    assert find("large", file, said=said) == ServedModel(second, "b")
    assert said == []
    assert find(None, file, said=said) == ServedModel(first, "a")
    assert said == ["warning: of the models small, large a file's first is read; choose one with --model KEY"]


def test_a_key_of_the_models_that_ship_needs_no_file(tmp_path: Path, fake_hub: FakeHub) -> None:
    choice = choose("causal_gpt2")
    serving = choice.config.serving
    assert (choice.name, serving.weights_model_name, serving.num_nodes) == (None, "gpt2", 3)
    own = model_file(tmp_path / "etc", serving={"ctx_length": 64})
    assert choose("causal_gpt2", own).config.serving.ctx_length == 64
    own = model_file(tmp_path / "etc", causal_gpt2={"hf_model_name": "some/other"})
    assert choose("causal_gpt2", own).config.serving.weights_model_name is None, "a file's own model has the same key"


def test_a_key_means_that_no_other_model_is_read(tmp_path: Path) -> None:
    one = model_file(tmp_path / "1", one={"hf_model_name": "org/one"})
    two = model_file(tmp_path / "2", two={"hf_model_name": "org/two", "weights_model_name": "gpt2"})
    serving = choose("one", one, two).config.serving
    assert (serving.hf_model_name, serving.weights_model_name) == ("org/one", None)


def test_a_folder_of_that_name_comes_before_a_key(tmp_path: Path) -> None:
    model_folder(tmp_path / "work" / "causal_gpt2")
    assert find("causal_gpt2", weights_model_name="gpt2") == ServedModel(Path("causal_gpt2"), "causal_gpt2")


def test_a_name_that_is_nothing_says_what_was_tried() -> None:
    with pytest.raises(ConfigError) as caught:
        choose("./causal_gpt")
    assert str(caught.value) == (
        "--model is ./causal_gpt, but there is no such folder, no such key of a model file (causal_gpt2; nearest: "
        "causal_gpt2), and it is no Hugging Face id. Name one of these"
    )


def test_a_misspelt_key_that_could_be_an_id_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^--model is causal_gpt, which .* key of a model file: causal_gpt2$"):
        find("causal_gpt")


def test_an_id_is_downloaded_with_its_tokenizer(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.snapshots["org/one", None] = model_folder(tmp_path / "hub")
    assert find("org/one", weights_model_name="gpt2") == ServedModel(tmp_path / "hub", "org/one")
    ((_, revision, patterns),) = fake_hub.downloads
    assert revision is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*patterns}
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in patterns)


def test_without_a_name_the_error_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"no model is named\. Give --model .* serving\.weights_model_name"):
        find()


# --- where weights come from


def test_a_local_folder_wins(tmp_path: Path, fake_hub: FakeHub) -> None:
    folder = model_folder(tmp_path / "mine")
    assert find(hf_model_name=str(folder), weights_model_name="gpt2") == ServedModel(folder, "mine")
    assert find("causal_gpt2", hf_model_name=str(folder)) == ServedModel(folder, "mine")
    assert find(weights_model_name=str(folder)) == ServedModel(folder, "mine")
    assert fake_hub.downloads == []


def test_a_revision_is_what_is_downloaded(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    fake_hub.snapshots[GPT2, "v1"] = model_folder(tmp_path / "hub" / "607a30")
    use_table(monkeypatch, hf_model_name=GPT2, revision="v1", sha256=SHA256)
    said: list[str] = []
    for _ in range(2):
        assert find(weights_model_name="mine", hf_model_name=GPT2, said=said).id == GPT2
    assert [download[:2] for download in fake_hub.downloads] == [(GPT2, "v1")] * 2
    assert said == []
    assert (cache / "models" / "checksums.json").is_file()
    find(weights_model_name="mine", hf_model_name="org/other", said=said)
    assert said == [f"serving.weights_model_name mine is served, which is {GPT2}; not serving.hf_model_name org/other"]


def test_the_key_that_ships_asks_for_its_revision_and_refuses_another_file(tmp_path: Path, fake_hub: FakeHub) -> None:
    source = find_weights("gpt2")
    fake_hub.snapshots[GPT2, source.revision] = model_folder(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    with pytest.raises(ConfigError) as caught:
        find("causal_gpt2")
    assert str(caught.value) == (
        f"{file} is not the file that was published: its sha256 is {SHA256}, weights gpt2 in model_weights.yaml wants "
        f"{source.sha256}. Delete it, so that it is downloaded again, or correct sha256 there"
    )


def test_a_download_that_fails_names_key_and_revision(fake_hub: FakeHub) -> None:
    with pytest.raises(
        ConfigError, match=rf"^hf_model_name of weights gpt2 in model_weights.yaml is {GPT2} at rev.* 607"
    ):
        find(weights_model_name="gpt2")


def test_a_checksum_is_of_one_file(tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_hub.snapshots[GPT2, None] = model_folder(tmp_path / "hub", weights=None)
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name in names:
        (folder / name).write_bytes(WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    use_table(monkeypatch, hf_model_name=GPT2, sha256=SHA256)
    with pytest.raises(ConfigError, match="has its weights in 2 files"):
        find(weights_model_name="mine")


def test_a_table_beside_the_file_comes_before_the_one_that_ships(tmp_path: Path, fake_hub: FakeHub) -> None:
    file = model_file(tmp_path / "etc", m={"weights_model_name": "gpt2"}, n={"weights_model_name": "gpt2-xl"})
    (tmp_path / "etc" / "model_weights.yaml").write_text("gpt2:\n  hf_model_name: org/own\n")
    fake_hub.snapshots["org/own", None] = model_folder(tmp_path / "hub")
    fake_hub.snapshots["openai-community/gpt2-xl", None] = tmp_path / "hub"
    assert find("m", file).id == "org/own"
    assert find("n", file).id == "openai-community/gpt2-xl"


def test_an_unknown_key_of_weights_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^serving\.weights_model_name: preset .* no weights gpt3; nearest: gpt2;"):
        find(weights_model_name="gpt3", hf_model_name=GPT2)


# --- weights of an address


def test_weights_of_an_address_are_served_with_the_rest_of_a_folder(
    tmp_path: Path, server: FilesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = model_folder(tmp_path / "rest", weights=None)
    (rest / "merges.txt").write_text("a")
    use_table(monkeypatch, url=f"{server.url}/gpt/model.safetensors", sha256=SHA256)
    said: list[str] = []
    served = find(weights_model_name="mine", hf_model_name=str(rest), said=said)
    assert said == [f"downloading {server.url}/gpt/model.safetensors, 0.0 MB"]
    assert served.id == served.folder.name == "mine"
    assert (served.folder / "model.safetensors").read_bytes() == WEIGHTS
    (rest / "tokenizer.json").write_text('{"new": 1}')
    (rest / "merges.txt").unlink()
    assert find(weights_model_name="mine", hf_model_name=str(rest)) == served
    assert {file.name for file in served.folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (served.folder / "tokenizer.json").read_text() == '{"new": 1}'
    assert server.asked == ["/gpt/model.safetensors"]


def test_weights_of_an_address_are_served_with_the_rest_of_an_id(
    tmp_path: Path, server: FilesServer, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.snapshots[GPT2, None] = model_folder(tmp_path / "hub", weights=None)
    use_table(monkeypatch, url=f"{server.url}/gpt/model.safetensors")
    served = find(weights_model_name="mine", hf_model_name=GPT2)
    assert (served.id, (served.folder / "config.json").read_text()) == ("mine", CONFIG)
    assert not any("safetensors" in pattern for pattern in fake_hub.downloads[0][2])
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks config\.json or a tokenizer"):
        find(weights_model_name="mine", hf_model_name=GPT2)


def test_weights_of_an_address_are_served_with_what_lies_beside_them(
    server: FilesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_table(monkeypatch, url=f"{server.url}/gpt/model.safetensors?download=true")
    with pytest.raises(ConfigError, match=r"no config\.json beside http://\S+/gpt/model\.safetensors, and serving\.hf"):
        find(weights_model_name="mine")
    server.files["/gpt/config.json"] = CONFIG.encode()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json beside"):
        find(weights_model_name="mine")
    assert "/gpt/model.safetensors" not in server.asked, "nothing large before it is known to be of use"
    server.files["/gpt/tokenizer.json"] = b"{}"
    served = find(weights_model_name="mine")
    assert {file.name for file in served.folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    server.asked.clear()
    assert find(weights_model_name="mine") == served
    assert server.asked == [], "what was loaded once loads again without a network"


def test_a_page_instead_of_a_configuration_is_none(server: FilesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files |= {"/gpt/config.json": b"<html>", "/gpt/tokenizer.json": b"{}"}
    use_table(monkeypatch, url=f"{server.url}/gpt/model.safetensors")
    with pytest.raises(ConfigError, match=r"no config\.json beside"):
        find(weights_model_name="mine")


def test_a_model_of_an_address_writes_what_its_folder_writes(
    server: FilesServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOLCLUSTER_DATA", "")
    folder = trained_folder("stories260K-hf")
    monkeypatch.setenv("SMOLCLUSTER_DATA", str(tmp_path / "cache"))
    server.files |= {f"/s/{file.name}": file.read_bytes() for file in folder.iterdir()}
    use_table(monkeypatch, url=f"{server.url}/s/model.safetensors")
    served = find(weights_model_name="mine")
    texts = []
    for path in (folder, served.folder):
        pieces: list[str] = []
        service = make_service(str(path), ServingConfig(max_concurrent=1), dtype="fp64", model=served.id)
        assert service.model == "mine"
        write_on(service, "Once upon a time", Wishes(seed=1, max_tokens=12), pieces.append)
        texts.append("".join(pieces))
    assert texts[0] == texts[1] != ""


# --- what is said


def test_layers_that_are_told_are_compared_with_the_models_own(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    said: list[str] = []
    find(hf_model_name=str(folder), num_layers=2, said=said)
    assert said == []
    find(hf_model_name=str(folder), num_layers=12, said=said)
    assert said == ["warning: serving.num_layers is 12, but m has 2 layers, which count"]


@pytest.mark.parametrize(("nodes", "lines"), [(None, 0), (1, 0), (3, 1)])
def test_one_process_for_several_nodes_is_noted(nodes: int | None, lines: int) -> None:
    said: list[str] = []
    note_stages(ServingConfig(num_nodes=nodes), said.append, " or --cluster FILE")
    text = "serving.num_nodes is 3, but this is one process: 3 stages need --local 3 or --cluster FILE"
    assert said == [text] * lines
