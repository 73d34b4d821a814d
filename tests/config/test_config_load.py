"""Precedence, sources, and one clear line for every mistake."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolcluster.config.dump import config_yaml
from smolcluster.config.load import Resolved, check_file, load_config
from smolcluster.config.schema import ClusterConfig
from smolcluster.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that messages name files without their folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def load(**sources: Any) -> Resolved:
    return load_config(**{"environ": {}, **sources})


def error_of(**sources: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    return str(caught.value)


# --- precedence: the same key from every level, lowest level first

LEVELS = ("default", "preset", "config", "cluster", "environment", "override")


def sources_for(folder: Path, levels: tuple[str, ...]) -> dict[str, Any]:
    text = "training:\n  batch_size: {}\n"
    everything: dict[str, dict[str, Any]] = {
        "default": {},
        "preset": {"preset": "demo"},
        "config": {"files": [write(folder, text.format(102), "a.yaml")]},
        "cluster": {"cluster_files": [write(folder, text.format(103), "b.yaml")]},
        "environment": {"environ": {"SMOLCLUSTER__TRAINING__BATCH_SIZE": "104"}},
        "override": {"overrides": ["training.batch_size=105"]},
    }
    chosen: dict[str, Any] = {}
    for level in levels:
        chosen.update(everything[level])
    return chosen


EXPECTED = {
    "default": (None, "default"),
    "preset": (4, "preset demo"),
    "config": (102, "a.yaml:2"),
    "cluster": (103, "b.yaml:2"),
    "environment": (104, "environment SMOLCLUSTER__TRAINING__BATCH_SIZE"),
    "override": (105, "--override"),
}


@pytest.mark.parametrize(("low", "high"), list(itertools.combinations(LEVELS, 2)))
def test_the_higher_of_two_levels_wins_and_is_named_as_the_source(folder: Path, low: str, high: str) -> None:
    resolved = load(**sources_for(folder, (low, high)))
    assert (resolved.config.training.batch_size, resolved.sources["training.batch_size"]) == EXPECTED[high]


def test_all_levels_at_once_give_the_override(folder: Path) -> None:
    assert load(**sources_for(folder, LEVELS)).config.training.batch_size == 105


@pytest.mark.parametrize("preset", ["demo", "classicdp_mnist", "classicdp_llama"])
def test_a_configuration_can_be_laid_under_all_others(preset: str) -> None:
    base = load(preset=preset, overrides=["cluster.memory=32", "data.tokenizer=bytes"]).config
    resolved = load(base=(base, "checkpoint x"), overrides=["training.max_steps=7"])
    assert resolved.config.training.max_steps == 7
    changed = base.training.model_copy(update={"max_steps": 7})
    assert resolved.config == base.model_copy(update={"training": changed})
    assert (resolved.sources["algorithm"], resolved.warnings) == ("checkpoint x", ())


def test_a_file_that_implies_an_algorithm_gives_way_to_the_configuration_below_it(folder: Path) -> None:
    file = write(folder, "seed: 3\n", "cluster_config_edp.yaml")
    resolved = load(base=(load(preset="demo").config, "checkpoint x"), cluster_files=[file])
    assert (resolved.config.algorithm, resolved.config.cluster.seed) == ("classicdp", 3)


def test_a_flag_wins_over_the_environment_and_is_named_by_its_option(folder: Path) -> None:
    resolved = load(environ={"SMOLCLUSTER__TRAINING__MAX_STEPS": "5"}, flags={"training.max_steps": 6})
    assert resolved.config.training.max_steps == 6
    assert resolved.sources["training.max_steps"] == "--max-steps"


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    assert load(preset="demo", flags={"algorithm": None}).config.algorithm == "classicdp"


def test_a_flag_and_an_override_with_the_same_value_are_accepted() -> None:
    assert load(overrides=["algorithm=edp"], flags={"algorithm": "edp"}).config.algorithm == "edp"


def test_a_flag_and_an_override_that_differ_are_refused() -> None:
    assert error_of(overrides=["training.max_steps=5"], flags={"training.max_steps": 6}) == (
        "--max-steps 6 and --override training.max_steps=5 contradict each other; give only one of them"
    )


def test_a_flag_is_compared_with_an_override_of_the_whole_section_too() -> None:
    assert "contradict" in error_of(overrides=["training={max_steps: 5}"], flags={"training.max_steps": 6})


def test_the_later_of_two_files_wins_key_by_key(folder: Path) -> None:
    first = write(folder, "training: {epochs: 1, batch_size: 2}\n", "first.yaml")
    second = write(folder, "training:\n  batch_size: 3\n", "second.yaml")
    resolved = load(files=[first, second])
    assert (resolved.config.training.epochs, resolved.config.training.batch_size) == (1, 3)
    assert resolved.sources["training.epochs"] == "first.yaml:1"
    assert resolved.sources["training.batch_size"] == "second.yaml:2"


def test_the_later_of_two_overrides_wins() -> None:
    assert load(overrides=["training.epochs=1", "training.epochs=2"]).config.training.epochs == 2


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCLUSTER__TRAINING__EPOCHS", "9")
    assert load_config().config.training.epochs == 9


def test_an_empty_environment_variable_counts_as_not_set() -> None:
    assert load(environ={"SMOLCLUSTER__CHECKPOINT__KEEP": ""}).config.checkpoint.keep == 3


def test_environment_names_find_keys_with_capitals() -> None:
    value = "{workers: {regular: [{hostname: a, rank: 0}]}}"
    config = load(environ={"SMOLCLUSTER__CLUSTER__ALLTOALLTOPOLOGY": value}).config
    assert config.cluster.allToAllTopology is not None


def test_other_variables_of_the_program_are_no_configuration() -> None:
    assert load(environ={"SMOLCLUSTER_TOKEN": "x", "SMOLCLUSTER_DATA": "y"}).config == load().config


def test_every_schema_key_has_a_source() -> None:
    sources = load().sources
    assert set(sources.values()) == {"default"}
    assert {"algorithm", "training.batch_size", "cluster.web_interface.api_port", "serving.resume_s"} <= set(sources)
    assert "training" not in sources


# --- merging of maps and lists


def test_a_map_of_hosts_is_replaced_whole_by_a_later_file(folder: Path) -> None:
    first = write(folder, "host_ip: {a: 10.0.0.1, b: 10.0.0.2}\n", "first.yaml")
    second = write(folder, "host_ip: {c: 10.0.0.3}\n", "second.yaml")
    assert load(cluster_files=[first, second]).config.cluster.host_ip == {"c": "10.0.0.3"}


def test_an_override_sets_a_single_entry_of_a_map(folder: Path) -> None:
    file = write(folder, "buffer_size:\n  mini1: 8\n  pi4: 2\n")
    resolved = load(cluster_files=[file], overrides=["cluster.buffer_size.mini1=4"])
    assert resolved.config.cluster.buffer_size == {"mini1": 4, "pi4": 2}
    assert resolved.sources["cluster.buffer_size.mini1"] == "--override"
    assert resolved.sources["cluster.buffer_size.pi4"] == "run.yaml:3"


def test_a_host_name_with_dots_is_one_key() -> None:
    config = load(overrides=["cluster.host_ip.mini1.local=10.0.0.1", "cluster.ssh.mini1.local.user=me"]).config
    assert config.cluster.host_ip == {"mini1.local": "10.0.0.1"}
    assert config.cluster.ssh["mini1.local"].user == "me"


def test_a_section_with_nothing_below_it_says_nothing(folder: Path) -> None:
    assert load(preset="demo", files=[write(folder, "training:\n")]).config == load(preset="demo").config


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_says_nothing(folder: Path, text: str) -> None:
    assert load(files=[write(folder, text)]).config == load().config


# --- cluster files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("tls: true\nseed: 7\n", 2),
        ("cluster:\n  tls: true\n  seed: 7\n", 3),
        ("seed: 7\ncluster:\n  tls: true\n", 1),
    ],
    ids=["flat", "nested", "mixed"],
)
def test_a_cluster_file_may_be_flat_or_nested(folder: Path, text: str, line: int) -> None:
    resolved = load(cluster_files=[write(folder, text)])
    assert (resolved.config.cluster.seed, resolved.config.cluster.tls) == (7, True)
    assert resolved.sources["cluster.seed"] == f"run.yaml:{line}"


def test_a_cluster_file_may_set_other_sections_too(folder: Path) -> None:
    config = load(cluster_files=[write(folder, "seed: 7\ntraining:\n  epochs: 4\n")]).config
    assert (config.cluster.seed, config.training.epochs) == (7, 4)


def test_a_flat_cluster_file_may_be_given_as_config_too(folder: Path) -> None:
    file = write(folder, "tls: true\nseed: 7\n")
    assert load(files=[file]).config == load(cluster_files=[file]).config


def test_what_is_no_key_at_all_is_looked_for_in_the_section_of_the_file(folder: Path) -> None:
    file = write(folder, "treads: 3\n")
    assert error_of(files=[file]).startswith("run.yaml:1: unknown key treads; keys of the top level:")
    assert error_of(cluster_files=[file]).startswith("run.yaml:1: unknown key cluster.treads; nearest: cluster.")


# --- YAML


@pytest.mark.parametrize("number", ["6e-4", "6E-4", "6.0e-4", ".0006", "0.0006", "'6e-4'"])
def test_numbers_are_read_in_every_usual_spelling(folder: Path, number: str) -> None:
    assert load(files=[write(folder, f"training: {{learning_rate: {number}}}\n")]).config.training.learning_rate == 6e-4
    assert load(overrides=[f"training.learning_rate={number}"]).config.training.learning_rate == 6e-4


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert load(overrides=["training.max_steps=1e4"]).config.training.max_steps == 10_000


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("on", True), ("true", True), ("no", False), ("off", False)]
)
def test_switches_are_read_in_every_usual_spelling(text: str, value: bool) -> None:
    assert load(overrides=[f"training.track_gradients={text}"]).config.training.track_gradients is value


def test_off_is_a_word_where_the_schema_wants_a_word() -> None:
    config = load(overrides=["logging.wandb=off", "cluster.shared_memory=off"]).config
    assert (config.logging.wandb, config.cluster.shared_memory) == ("off", "off")


def test_override_values_are_yaml() -> None:
    config = load(overrides=["training.grad_clip_norm=null", "cluster.workers=[a, b]", "cluster.shares={a: 2}"]).config
    assert config.training.grad_clip_norm is None
    assert config.cluster.workers == ("a", "b")
    assert config.cluster.shares == {"a": 2.0}


# --- mistakes in files: exactly one line each, with the place

TOPOLOGY = "allToAllTopology:\n  workers:\n    regular:\n"

MISTAKES = {
    "misspelt key": ("training:\n  batchsize: 4\n", "2: unknown key training.batchsize; nearest: training.batch_size"),
    "misspelt section": ("trainng:\n  epochs: 4\n", "1: unknown key trainng; nearest: training"),
    "key of another section": (
        "training:\n  epochs: 1\n  warmup_iters: 4\n",
        "3: unknown key training.warmup_iters; nearest: lr_schedule.warmup_iters",
    ),
    "misspelt key of another section": (
        "training:\n  warmup_iter: 4\n",
        "2: unknown key training.warmup_iter; nearest: lr_schedule.warmup_iters",
    ),
    "key of several sections": (
        "training:\n  hf_model_name: x\n",
        "2: unknown key training.hf_model_name; nearest: model.hf_model_name or serving.hf_model_name",
    ),
    "key without its section": ("max_steps: 4\n", "1: unknown key max_steps; nearest: training.max_steps"),
    "key that breaks the line": (
        '"a\\nb": 4\n',
        r"1: unknown key 'a\nb'; keys of the top level: algorithm, backend, "
        "model, training, lr_schedule, data, checkpoint, logging, cluster, serving",
    ),
    "initials": ("training:\n  lr: 0.1\n", "2: unknown key training.lr; nearest: training.learning_rate"),
    "key like nothing else": (
        "logging:\n  zzz: 1\n",
        "2: unknown key logging.zzz; keys of logging: project_name, wandb, log_interval",
    ),
    "text for a number": (
        "training:\n  batch_size: many\n",
        "2: training.batch_size: got 'many', expected a whole number of at least 1, or null",
    ),
    "switch for a number": (
        "training:\n  batch_size: true\n",
        "2: training.batch_size: got true, expected a whole number of at least 1, or null",
    ),
    "fraction for a whole number": (
        "training:\n  epochs: 1.5\n",
        "2: training.epochs: got 1.5, expected a whole number of at least 1, or null",
    ),
    "number out of range": (
        "training:\n\n  polyak_alpha: 1.5\n",
        "3: training.polyak_alpha: got 1.5, expected a number from 0 to 1",
    ),
    "zero learning rate": (
        "training: {learning_rate: 0}\n",
        "1: training.learning_rate: got 0, expected a number above 0",
    ),
    "infinity": ("training:\n  learning_rate: .inf\n", "2: training.learning_rate: got inf, expected a number above 0"),
    "null where a value is needed": (
        "training:\n  learning_rate: null\n",
        "2: training.learning_rate: got null, expected a number above 0",
    ),
    "number for text": ("data:\n  path: 12\n", "2: data.path: got 12, expected text (in quotes), or null"),
    "unknown choice": (
        "training:\n  optimizer: adam\n",
        "2: training.optimizer: got 'adam', expected one of adamw, sgd",
    ),
    "unknown algorithm": (
        "algorithm: clasicdp\n",
        "1: algorithm: got 'clasicdp', expected one of single, classicdp, fsdp, syncps, edp, mp, mp_pipeline, ep",
    ),
    "unknown model": (
        "model:\n  type: gtp\n",
        "2: model.type: got 'gtp', expected one of simple_nn, gpt, moe, hf, or package.module:ClassName of your own",
    ),
    "value for a section": (
        "training: 5\n",
        "1: training: got 5, expected a section with keys such as batch_size, epochs, max_steps",
    ),
    "map where a number is wanted": (
        "training:\n  epochs: {a: 1}\n",
        "2: training.epochs: got {'a': 1}, expected a whole number of at least 1, or null",
    ),
    "doubled key": ("training:\n  epochs: 1\n  epochs: 2\n", "3: key epochs is given twice (first in line 2)"),
    "tab": ("training:\n\tepochs: 1\n", "2: a tab indents this line; YAML allows only spaces"),
    "list at the top": ("- a\n- b\n", "1: expected `key: value` lines, found a list"),
    "text at the top": ("hello\n", "1: expected `key: value` lines, found only 'hello'"),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        "2: not valid YAML: expected a single document in the stream, but found another document",
    ),
    "seed that torch does not know": (
        "cluster:\n  seed: 9223372036854775808\n",
        "2: cluster.seed: more than 9223372036854775807, the largest whole number that torch knows",
    ),
    "seconds that sockets do not know": (
        "patience: 1e9\n",
        "1: cluster.patience: got 1000000000.0, expected a number from 0.1 to 86400",
    ),
    "switch as seconds": ("patience: true\n", "1: cluster.patience: got true, expected a number from 0.1 to 86400"),
    "key without a name": (
        "cluster:\n  '': 3\n",
        "2: unknown key cluster.''; keys of cluster: " + ", ".join(ClusterConfig.model_fields),
    ),
    "unclosed bracket": ("a: [1, 2\n", "2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "two values in a line": ("a: b: c\n", "1: not valid YAML: mapping values are not allowed here"),
    "list as a key": ("? [a, b]\n: 3\n", "1: a key must be a name, not a list or a mapping"),
    "control character": ("a: 1\nb: \x01\n", "2: unreadable character U+0001"),
    "tag": ("training: !!python/object:os.system {}\n", "1: the tag !!python/object:os.system is not allowed"),
    "anchor in itself": ("training: &a\n  x: *a\n", "2: an anchor contains itself"),
    "floor above peak": (
        "training:\n  learning_rate: 1e-4\nlr_schedule:\n  min_lr: 1e-3\n",
        "4: lr_schedule.min_lr: 0.001 is more than training.learning_rate 0.0001",
    ),
    "heads that do not divide": (
        "model:\n  type: gpt\n  model_dim: 250\n",
        "3: model.model_dim: 250 is not a multiple of model.num_heads 4",
    ),
    "quantization contradicts compression": (
        "cluster:\n  use_quantization: true\n  compression: bf16\n",
        "3: cluster.compression: bf16 contradicts cluster.use_quantization true (true means int8); remove one of them",
    ),
    "no quantization contradicts int8": (
        "cluster:\n  use_quantization: false\n  compression: int8\n",
        "3: cluster.compression: int8 contradicts cluster.use_quantization false (true means int8); remove one of them",
    ),
    "text model on images": (
        "model:\n  type: gpt\ndata:\n  dataset: mnist\n",
        "4: data.dataset: mnist is images, but model.type gpt is trained on text",
    ),
    "text without a file": ("data:\n  dataset: text\n", "2: data.dataset: text needs data.path (a file or folder)"),
    "hf without a name": ("model:\n  type: hf\n", "2: model.type: hf needs model.hf_model_name (id or folder)"),
    "pretrained without hf": (
        "model:\n  init: pretrained\n",
        "2: model.init: pretrained needs model.type hf or gpt, but model.type is simple_nn",
    ),
    "pretrained gpt without a name": (
        "model:\n  type: gpt\n  init: pretrained\n",
        "3: model.init: pretrained needs model.hf_model_name (id or folder of a GPT-2)",
    ),
    "more experts than there are": (
        "model: {type: moe, num_experts: 2,\n  top_k: 4}\n",
        "2: model.top_k: 4 is more than model.num_experts 2",
    ),
    "more parts than samples": (
        "training:\n  batch_size: 4\n  micro_batches: 8\n",
        "3: training.micro_batches: 8 parts of a batch of 4; lower it or raise training.batch_size",
    ),
    "nccl on the cpu": (
        "backend: nccl\ntraining:\n  device: cpu\n",
        "1: backend: nccl needs training.device cuda, but it is cpu; use tcp or gloo",
    ),
    "port out of range": (
        "port: {a: 70000}\n",
        "1: cluster.port.a: got 70000, expected a whole number from 1 to 65535",
    ),
    "text for a port": (
        "port: x\n",
        "1: cluster.port: got 'x', expected a whole number from 1 to 65535, "
        "or a map of host names to whole numbers from 1 to 65535",
    ),
    "no address": (
        "host_ip:\n  a: 10.0.0.300\n",
        "2: cluster.host_ip.a: got '10.0.0.300', expected an IP address or a host name",
    ),
    "host name that is an option": (
        "host_ip:\n  -oProxyCommand: 10.0.0.3\n",
        "2: cluster.host_ip: got the key '-oProxyCommand', expected a host name (letters, digits, '.', '-', '_')",
    ),
    "worker without an address": (
        "host_ip:\n  a: 10.0.0.3\nworkers: [b]\n",
        "3: cluster.workers: b has no address in cluster.host_ip (a)",
    ),
    "server as a worker": (
        "workers: [a]\nserver: a\n",
        "1: cluster.workers: a is the server; it cannot be a worker too",
    ),
    "doubled worker": ("workers: [a, a]\n", "1: cluster.workers: a is given twice"),
    "doubled hostname": (
        TOPOLOGY + "      - {hostname: a, rank: 0}\n      - {hostname: a, rank: 1}\n",
        "5: cluster.allToAllTopology.workers.regular[1].hostname: a is given twice",
    ),
    "doubled rank": (
        TOPOLOGY + "      - {hostname: a, rank: 0}\n      - {hostname: b, rank: 0}\n",
        "5: cluster.allToAllTopology.workers.regular[1].rank: 0 is given twice",
    ),
    "gap in the ranks": (
        TOPOLOGY + "      - {hostname: a, rank: 0}\n      - {hostname: b, rank: 2}\n",
        "3: cluster.allToAllTopology.workers.regular: the ranks are 0, 2; expected 0 to 1 without a gap",
    ),
    "entry without a rank": (
        TOPOLOGY + "      - hostname: a\n        ip: 10.0.0.1\n",
        "4: cluster.allToAllTopology.workers.regular[0]: the key rank is missing",
    ),
    "misspelt key of an entry": (
        TOPOLOGY + "      - hostname: a\n        rank: 0\n        prt: 3\n",
        "6: unknown key cluster.allToAllTopology.workers.regular[0].prt; "
        "nearest: cluster.allToAllTopology.workers.regular[0].port",
    ),
    "unknown word for shares": (
        "shares: fast\n",
        "1: cluster.shares: got 'fast', expected even, auto, a list of weights above 0 in rank order, "
        "or a map of host names to weights",
    ),
    "negative share": ("shares: [1,\n -2]\n", "2: cluster.shares[1]: got -2, expected a number above 0"),
    "key in two places": (
        "seed: 1\ncluster:\n  seed: 2\n",
        "1: seed is given here and under cluster as well",
    ),
}


@pytest.mark.parametrize(("text", "message"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_a_mistake_gives_one_line_with_its_place(folder: Path, text: str, message: str) -> None:
    assert check_file(write(folder, text)).errors == (f"run.yaml:{message}",)
    assert "\n" not in message


@pytest.mark.parametrize(("text", "message"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_loading_stops_at_a_mistake(folder: Path, text: str, message: str) -> None:
    kind = "cluster_files" if "cluster." in message or "under cluster" in message else "files"
    lines = error_of(**{kind: [write(folder, text)]}).splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("run.yaml:")


def test_all_mistakes_of_a_file_are_listed_in_its_order(folder: Path) -> None:
    file = write(folder, "training:\n  zap: 1\n  epochs: x\nmodel:\n  typ: gpt\nalgorithm: 3\n")
    assert [error.split(":")[1] for error in check_file(file).errors] == ["2", "3", "5", "6"]


def test_loading_names_the_first_mistake_and_counts_the_others(folder: Path) -> None:
    file = write(folder, "training:\n  epochs: x\n  batchsize: 1\n")
    assert error_of(files=[file]) == (
        "run.yaml:2: training.epochs: got 'x', expected a whole number of at least 1, or null\n"
        "and 1 more (smolcluster config check FILE lists all of a file)"
    )


# --- mistakes elsewhere


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"preset": "clasicdp_mnist"},
            "unknown preset clasicdp_mnist; nearest: classicdp_mnist (all: smolcluster config list)",
        ),
        ({"preset": "../demo"}, "unknown preset ../demo; nearest: demo (all: smolcluster config list)"),
        ({"files": ["nope.yaml"]}, "nope.yaml: no such file"),
        ({"cluster_files": ["nope.yaml"]}, "nope.yaml: no such file"),
        (
            {"overrides": ["training.epochs"]},
            "--override training.epochs: write KEY=VALUE, such as training.batch_size=16",
        ),
        ({"overrides": ["=3"]}, "--override =3: write KEY=VALUE, such as training.batch_size=16"),
        ({"overrides": ["training.epoch=3"]}, "--override: unknown key training.epoch; nearest: training.epochs"),
        ({"overrides": ["epochs=3"]}, "--override: unknown key epochs; nearest: training.epochs"),
        (
            {"overrides": ["training.epochs=[1"]},
            "--override training.epochs=[1: not valid YAML: expected ',' or ']', but got '<stream end>'",
        ),
        (
            {"overrides": ["training.epochs=x"]},
            "--override: training.epochs: got 'x', expected a whole number of at least 1, or null",
        ),
        (
            {"overrides": ["training=5"]},
            "--override: training: got 5, expected a section with keys such as batch_size, epochs, max_steps",
        ),
        (
            {"environ": {"SMOLCLUSTER__TRAINING__EPOCH": "3"}},
            "environment SMOLCLUSTER__TRAINING__EPOCH: unknown key training.epoch; nearest: training.epochs",
        ),
        (
            {"environ": {"SMOLCLUSTER__TRAINING__EPOCHS": "x"}},
            "environment SMOLCLUSTER__TRAINING__EPOCHS: training.epochs: got 'x', "
            "expected a whole number of at least 1, or null",
        ),
        (
            {"flags": {"algorithm": "dp"}},
            "--algorithm: algorithm: got 'dp', expected one of single, classicdp, fsdp, "
            "syncps, edp, mp, mp_pipeline, ep",
        ),
        (
            {"preset": "demo", "overrides": ["data.dataset=mnist"]},
            "--override: data.dataset: mnist is images, but model.type gpt is trained on text "
            "(model.type: preset demo)",
        ),
    ],
)
def test_a_mistake_outside_files_names_its_origin(folder: Path, sources: dict[str, Any], message: str) -> None:
    assert error_of(**sources) == message


def test_a_folder_is_no_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    assert error_of(files=["sub"]).startswith("sub: cannot be read (")


def test_text_that_is_not_utf8_is_refused_with_its_line(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"a: 1\nb: \xff\n")
    assert error_of(files=["run.yaml"]) == "run.yaml:2: not UTF-8 text; save the file as UTF-8"


def test_a_contradiction_between_two_files_names_both(folder: Path) -> None:
    first = write(folder, "training:\n  learning_rate: 1e-4\n", "first.yaml")
    second = write(folder, "lr_schedule:\n  min_lr: 1e-3\n", "second.yaml")
    assert error_of(files=[first, second]) == (
        "second.yaml:2: lr_schedule.min_lr: 0.001 is more than training.learning_rate 0.0001 "
        "(training.learning_rate: first.yaml:2)"
    )


def test_a_file_that_leaves_the_model_to_another_file_is_ok_alone_but_not_together(folder: Path) -> None:
    file = write(folder, "data:\n  dataset: pydoc\n")
    assert check_file(file).errors == ()
    assert "pydoc is text, but model.type simple_nn" in error_of(files=[file])


# --- warnings


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("host_ip:\n  a: 10.0.0.1\n  b: 10.0.0.1\n", "1: cluster.host_ip: a, b share the address 10.0.0.1 port 65432"),
        (
            TOPOLOGY + "      - {hostname: a, rank: 0, ip: 10.0.0.1}\n      - {hostname: b, rank: 1, ip: 10.0.0.1}\n",
            "1: cluster.allToAllTopology: a, b share the address 10.0.0.1 port 65432",
        ),
        ("model:\n  type: gpt\n  hidden: 3\n", "3: model.hidden: has no effect with model.type gpt"),
        (
            "lr_schedule:\n  kind: constant\n  min_lr: 1e-5\n",
            "3: lr_schedule.min_lr: has no effect with lr_schedule.kind constant",
        ),
        (
            "model:\n  num_layers: 4\ncluster:\n  num_layers: 6\n",
            "4: cluster.num_layers: 6 is ignored, model.num_layers 4 counts",
        ),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(folder: Path, text: str, warning: str) -> None:
    report = check_file(write(folder, text))
    assert report.errors == ()
    assert report.warnings == (f"run.yaml:{warning}",)


def test_the_config_file_of_a_run_names_all_keys_and_warns_of_none(folder: Path) -> None:
    for preset in ("single_mnist", "single_gpt"):
        file = write(folder, config_yaml(load(preset=preset).config))
        assert [warning for warning in check_file(file).warnings if "no effect" in warning] == []


def test_hosts_with_ports_of_their_own_do_not_clash(folder: Path) -> None:
    file = write(folder, "host_ip: {a: 10.0.0.1, b: 10.0.0.1}\nport: {default: 65432, b: 65433}\n")
    assert check_file(file).warnings == ()


def test_a_preset_that_an_override_turns_into_another_model_warns_of_nothing() -> None:
    sources = {"overrides": ["model.type=simple_nn", "data.dataset=mnist"]}
    assert load(preset="demo", **sources).warnings == ()


def test_neither_config_nor_its_commands_import_torch() -> None:
    program = (
        "import sys, smolcluster.config, smolcluster.cli.config; "
        "smolcluster.config.load_config('demo'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
