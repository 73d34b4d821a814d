"""Older spellings of a configuration, brought into the shape of the schema before files are merged.

Flat model files (`nn_config.yaml`), model files for serving (`model_config_inference.yaml`), and what a file's name
says of its cluster (`cluster_config_edp.yaml`). What the schema has no other reading for is translated silently; what
could be meant otherwise is noted, and `smolcluster config check` shows it. A translated value keeps its line, and the
key that the user wrote, for messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from smolcluster.config.document import Entry, Source, printable, shown
from smolcluster.config.explain import Problem, nearest
from smolcluster.config.schema import (
    IMAGE_DATASETS,
    MODEL_KEYS,
    TEXT_DATASETS,
    ClusterConfig,
    Config,
    TrainingConfig,
)
from smolcluster.errors import ConfigError
from smolcluster.kinds import Algorithm

# Keys of a flat model file, and what the schema calls them.
_FLAT_KEYS = {
    "batch_size": ("training", "batch_size"),
    "learning_rate": ("training", "learning_rate"),
    "num_epochs": ("training", "epochs"),
    "eval_steps": ("training", "eval_steps"),
    "track_gradients": ("training", "track_gradients"),
    "polyak_alpha": ("training", "polyak_alpha"),
}
_MODEL_TYPES = {"simplenn": "simple_nn", "causal_gpt2": "gpt", **{name: name for name in MODEL_KEYS}}
_DATASETS = {"wikitext-2": "wikitext2", **{name: name for name in (*IMAGE_DATASETS, *TEXT_DATASETS)}}
_CLUSTER_FILE = re.compile(r"cluster_config_(\w+)")
# A request does not end in less; a shorter one was meant for gradients, which are not collected in these files.
_SHORTEST_REQUEST_S = 1.0
# An unknown top-level key that holds any of these is a model of a model file.
_MODEL_FILE_MARKS = frozenset(
    ("hf_model_name", "weights_model_name", "active_decoding_strategy", "decoding_strategies")
)


@dataclass(frozen=True, slots=True)
class Implied:
    """A value that holds where nothing else gives one: the lowest of all levels, just above the built-in defaults.

    Attributes:
        path: its place in the schema.
        entry: the value; its source says what implies it.
        note: how it is read, where that could be meant otherwise.
    """

    path: tuple[str, ...]
    entry: Entry
    note: Problem | None = None


@dataclass(frozen=True, slots=True)
class Translated:
    """A file in the shape of the schema, but for keys of `cluster` that may still stand at the top level.

    Attributes:
        entry: the file.
        implied: what else it says.
        notes: how it is read.
        models: keys of its models, if it is a model file.
    """

    entry: Entry
    implied: tuple[Implied, ...] = ()
    notes: tuple[Problem, ...] = ()
    models: tuple[str, ...] = ()


def translate(entry: Entry, name: str, where: str, model: str | None = None) -> Translated:
    """Bring one file's older spellings into the shape of the schema.

    Args:
        entry: the file, a mapping.
        name: the file's name without `.yaml`, or the preset's.
        where: what the source of a value is called that only the name says.
        model: of a model file the one that becomes the section `serving`, if the file has it; None: its first.

    Raises:
        ConfigError: a value is given in two ways, or the clipping of a flat file is malformed.
    """
    keys = dict(entry.mapping())
    _move_flat_keys(keys, entry.source)
    models = tuple(key for key, below in keys.items() if _is_model_of_model_file(key, below))
    notes = [*_move_model_file(keys, models, model)]
    implied = [*_implied_algorithm(keys, name, where)]
    notes += _read_timeout(keys, entry.source, name, implied)
    return Translated(Entry(keys, entry.source), tuple(implied), tuple(notes), models)


def without_idle_type(top: Entry | None, over: Entry) -> Entry | None:
    """`top` without a model.type that has no use for the model_dim which `over` brings: `over` means a gpt then."""
    kind = top.at(("model", "type")) if top is not None else None
    if top is None or kind is None or not isinstance(kind.value, str):
        return top
    used = MODEL_KEYS.get(model_type_of(kind.value))
    means_gpt = over.at(("model", "model_dim")) is not None and over.at(("model", "type")) is None
    if not means_gpt or used is None or "model_dim" in used:
        return top
    model = top.mapping()["model"]
    kept = {key: below for key, below in model.mapping().items() if key != "type"}
    return Entry({**top.mapping(), "model": Entry(kept, model.source)}, top.source)


def implied_model(top: Entry) -> Iterator[Implied]:
    """What the merged sources say of the model without its own keys: a model with model_dim is gpt; and the model_name
    and num_layers of a cluster file."""
    kind, width = top.at(("model", "type")), top.at(("model", "model_dim"))
    name, num_layers = top.at(("cluster", "model_name")), top.at(("cluster", "num_layers"))
    if kind is None and width is not None:
        note = Problem(width.source, "model.type: not given; a model with model_dim is read as gpt")
        kind = Entry("gpt", Source(width.source.where, width.source.line))
        yield Implied(("model", "type"), kind, note)
    elif kind is None and name is not None and isinstance(name.value, str) and name.value.lower() in _MODEL_TYPES:
        note = Problem(name.source, f"model_name: {name.value} is read as model.type {model_type_of(name.value)}")
        kind = Entry(model_type_of(name.value), replace(name.source, key="model_name"))
        yield Implied(("model", "type"), kind, note)
    has_layers = kind is not None and isinstance(kind.value, str) and model_type_of(kind.value) in ("gpt", "moe")
    if has_layers and num_layers is not None and num_layers.value is not None:
        yield Implied(("model", "num_layers"), _named(num_layers, "num_layers"))


def with_own_names(top: Entry) -> tuple[Entry, list[Problem]]:
    """The merged configuration with the schema's names of models and datasets, and how each other name was read."""
    notes: list[Problem] = []
    for path, names in ((("model", "type"), _MODEL_TYPES), (("data", "dataset"), _DATASETS)):
        entry = top.at(path)
        name = names.get(entry.value.lower()) if entry is not None and isinstance(entry.value, str) else None
        if entry is None or name is None or name == entry.value:
            continue
        notes.append(Problem(entry.source, f"{_key_of(path, entry)}: {entry.value} is read as {name}"))
        section = top.mapping()[path[0]]
        changed = Entry({**section.mapping(), path[1]: Entry(name, entry.source)}, section.source)
        top = Entry({**top.mapping(), path[0]: changed}, top.source)
    return top, notes


def model_type_of(model_name: str) -> str:
    """The model type that the name of an architecture means: `causal_gpt2` → `gpt`; other names as they are."""
    return _MODEL_TYPES.get(model_name.lower(), model_name)


def _key_of(path: Sequence[str], entry: Entry) -> str:
    return entry.source.key or ".".join(path)


# --- flat model files


def _move_flat_keys(keys: dict[str, Entry], file: Source) -> None:
    for old, (section, key) in _FLAT_KEYS.items():
        if old in keys:
            _put(keys, file, section, key, _named(keys.pop(old), old))
    if "gradient_clipping" in keys:
        clipping = _clip_norm(keys.pop("gradient_clipping"))
        if clipping is not None:
            _put(keys, file, "training", "grad_clip_norm", clipping)
    if "dataset" in keys:
        named = keys.pop("dataset")
        if isinstance(named.value, Mapping):
            _refuse_other_keys(named, "dataset", ("name",))
            found = named.value.get("name")
            if found is not None:
                _put(keys, file, "data", "dataset", _named(found, "dataset.name"))
        elif named.value is not None:
            _put(keys, file, "data", "dataset", _named(named, "dataset"))
    model = keys.get("model")
    if model is not None and isinstance(model.value, str):
        keys["model"] = Entry({"type": _named(model, "model")}, model.source)


def _clip_norm(clipping: Entry) -> Entry | None:
    """`gradient_clipping` as one value: the largest norm, or null where it is switched off; None: it says nothing."""
    if clipping.value is None:
        return None
    if not isinstance(clipping.value, Mapping):
        raise ConfigError(
            f"{clipping.source}: gradient_clipping: got {shown(clipping.plain())}, "
            "expected the keys enabled and max_norm"
        )
    _refuse_other_keys(clipping, "gradient_clipping", ("enabled", "max_norm"))
    enabled, max_norm = clipping.value.get("enabled"), clipping.value.get("max_norm")
    is_on = _switch(enabled)
    if enabled is not None and not is_on:
        return Entry(None, replace(enabled.source, key="gradient_clipping.enabled"))
    if max_norm is not None:
        return _named(max_norm, "gradient_clipping.max_norm")
    if enabled is None:
        return None
    default = TrainingConfig.model_fields["grad_clip_norm"].default
    return Entry(default, replace(enabled.source, key="gradient_clipping.enabled"))


def _switch(enabled: Entry | None) -> bool:
    if enabled is None:
        return True
    value = enabled.value.lower() if isinstance(enabled.value, str) else enabled.value
    if value in ("yes", "on", "true") or value is True:
        return True
    if value in ("no", "off", "false") or value is False:
        return False
    raise ConfigError(
        f"{enabled.source}: gradient_clipping.enabled: got {shown(enabled.plain())}, expected true or false"
    )


def _refuse_other_keys(entry: Entry, name: str, known: Sequence[str]) -> None:
    for key, below in entry.mapping().items():
        if key not in known:
            guess = nearest(key, known)
            hint = f"nearest: {name}.{guess}" if guess else f"keys of {name}: {', '.join(known)}"
            raise ConfigError(f"{below.source}: unknown key {name}.{printable(key)}; {hint}")


# --- model files for serving


def _move_model_file(keys: dict[str, Entry], models: Sequence[str], wanted: str | None) -> Iterator[Problem]:
    """One model of a model file becomes the section `serving`: the wanted one, else the first."""
    for name in models:
        model = keys.pop(name)
        if name != (models[0] if wanted is None else wanted):
            if wanted is None:  # who names a model knows that the others are not read
                yield Problem(
                    model.source, f"{name}: not read; the first model of the file, {models[0]}, is the one served"
                )
            continue
        serving = keys.get("serving")
        if serving is not None and serving.value is not None:
            raise ConfigError(f"{model.source}: {name} is read as the section serving, which this file has as well")
        keys["serving"] = _named(model, name)
        yield Problem(model.source, f"{name}: read as the section serving, which this model is served with")


def _is_model_of_model_file(key: str, below: Entry) -> bool:
    # Not a section either that is misspelt: that is for the schema to say.
    is_known = key in ClusterConfig.model_fields or nearest(key, Config.model_fields) is not None
    return not is_known and bool(_MODEL_FILE_MARKS & below.mapping().keys())


# --- what follows from names and from other keys


def _implied_algorithm(keys: Mapping[str, Entry], name: str, where: str) -> Iterator[Implied]:
    match = _CLUSTER_FILE.fullmatch(name.lower())
    said = match.group(1) if match is not None else ""
    algorithm = "classicdp" if said == "ddp" else said
    if algorithm not in get_args(Algorithm) or "algorithm" in keys:
        return
    source = Source(where)
    note = Problem(source, f"ddp is read as algorithm {algorithm}") if said != algorithm else None
    yield Implied(("algorithm",), Entry(algorithm, source), note)


def _read_timeout(keys: dict[str, Entry], file: Source, name: str, implied: Sequence[Implied]) -> Iterator[Problem]:
    """`timeout` at the top level: of requests in the files for mp and serving, else of a step's stragglers."""
    timeout = keys.get("timeout")
    said = keys.get("algorithm", next((item.entry for item in implied if item.path == ("algorithm",)), None))
    algorithm = said.value if said is not None else None
    is_for_requests = algorithm in ("mp", "mp_pipeline") or (
        algorithm is None and (name.lower() == "cluster_config_inference" or "web_interface" in keys)
    )
    if timeout is None or timeout.value is None or not is_for_requests:
        return
    del keys["timeout"]
    value = timeout.value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _SHORTEST_REQUEST_S:
        yield Problem(
            timeout.source, f"timeout: {value} is ignored here; serving.timeout, a request's, is at least 1 second"
        )
        return
    _put(keys, file, "serving", "timeout", _named(timeout, "timeout"))
    yield Problem(timeout.source, f"timeout: {shown(value)} is read as serving.timeout, a request's")


# --- entries


def _named(entry: Entry, key: str) -> Entry:
    """`entry` with everything in it under the user's own name for it."""
    source = replace(entry.source, key=key)
    if isinstance(entry.value, Mapping):
        return Entry({name: _named(below, f"{key}.{printable(name)}") for name, below in entry.value.items()}, source)
    return Entry(entry.value, source)


def _put(keys: dict[str, Entry], file: Source, section: str, key: str, entry: Entry) -> None:
    """Add a value to a section of the file. A section that is no mapping is left for the schema to refuse."""
    there = keys.get(section)
    if there is not None and there.value is not None and not isinstance(there.value, Mapping):
        return
    inside = there.mapping() if there is not None else {}
    if key in inside:
        old, new = entry.source.key, f"{section}.{key}"
        raise ConfigError(f"{entry.source}: {old} is given here and as {new} as well; keep one of them")
    keys[section] = Entry({**inside, key: entry}, there.source if there is not None else file)
