"""Reads a configuration from everywhere it may come from, and remembers where each value came from.

Precedence, lowest first: built-in defaults, what a file's name or its other keys imply (compat.py), preset, --config
files, --cluster files, environment (`SMOLCLUSTER__TRAINING__BATCH_SIZE`), --override and its short forms such as
--max-steps. A later source replaces single keys of a section; lists, and maps with free keys such as `host_ip`, it
replaces whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from smolcluster.config.compat import (
    Translated,
    implied_model,
    model_type_of,
    translate,
    with_own_names,
    without_idle_type,
)
from smolcluster.config.document import Entry, Source, printable, read_file, read_value
from smolcluster.config.explain import (
    Problem,
    arms,
    describe,
    dotted,
    in_order,
    nearest,
    problems,
    section_at,
    source_of,
    type_at,
    written,
)
from smolcluster.config.hosts import address_clashes, count_clash, readings
from smolcluster.config.memory import memory_warning
from smolcluster.config.schema import (
    MODEL_KEYS,
    ClusterConfig,
    Config,
    Contradiction,
    ModelConfig,
    resolved_batch_size,
    resolved_epochs,
)
from smolcluster.config.weights import MODEL_WEIGHTS, check_model_weights, is_model_weights
from smolcluster.errors import ConfigError

ENVIRONMENT_PREFIX = "SMOLCLUSTER__"
# The model file that ships with the package.
MODEL_PRESET = "model_config_inference"
# Keys whose null stands for a number, and what gives it.
_AUTOMATIC = {"training.batch_size": resolved_batch_size, "training.epochs": resolved_epochs}
# Values that follow from another key where they are not given (schema.py).
_FOLLOWS = {
    "data.dataset": "model.type",
    "data.tokenizer": "model.hf_model_name",
    "cluster.compression": "cluster.use_quantization",
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and its origin.

    Attributes:
        config: the values.
        sources: dotted key → `default`, `preset NAME`, `FILE:LINE`, `environment NAME`, `--override`, the option's
            name, such as `--max-steps`, `name of FILE` or `follows KEY`. Has every key of the schema, and the entries
            of maps.
        warnings: one line each: what is read but probably not meant, or could be meant otherwise.
        readings: those of the warnings that only say how an ambiguity is read.
    """

    config: Config
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()
    readings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileReport:
    """What `smolcluster config check` says of one file. No errors: the file is ok."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def load_config(
    preset: str | None = None,
    files: Sequence[str | Path] = (),
    cluster_files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    base: tuple[Config, str] | None = None,
    model: str | None = None,
) -> Resolved:
    """Read, merge and validate a configuration.

    Args:
        preset: name of a preset, without `.yaml`.
        files: `--config` files, later ones win.
        cluster_files: `--cluster` files; keys outside any section belong to `cluster`. Win over `files`.
        overrides: `KEY=VALUE` texts, the key dotted, the value YAML; later ones win.
        flags: dotted key → value of an option that is a short form of an override. None: the option was not given.
        environ: environment variables; None: this process's.
        base: a configuration that all these are laid over instead of the defaults, and its name, such as a
            checkpoint's.
        model: the key of a model file that is read as the section `serving`, one of `model_keys`: where no source has
            it, the preset model_config_inference is the lowest. None: the first of each file.

    Raises:
        ConfigError: one or two lines that name the place, the key and what is accepted.
    """
    read = _read_sources(preset, files, cluster_files, model)
    if model is not None and not any(model in part.models for part in read):
        read.insert(0, _read_preset(MODEL_PRESET, model))
    top = None if base is None else _base(*base)
    for part in read:
        top = _merge(without_idle_type(top, part.entry), part.entry)
    for path, entry in _environment(os.environ if environ is None else environ):
        top = _assign(top, path, entry)
    overridden: Entry | None = None
    for text in overrides:
        path, entry = _override(text)
        top, overridden = _assign(top, path, entry), _assign(overridden, path, entry)
    for key, value in (flags or {}).items():
        if value is not None:
            _refuse_difference(key, value, overridden)
            top = _assign(top, _path(key), _entry(value, Source(flag_name(key))))
    return _resolve(*_completed(top if top is not None else Entry({}, Source("default")), read))


def model_keys(
    preset: str | None = None, files: Sequence[str | Path] = (), cluster_files: Sequence[str | Path] = ()
) -> list[str]:
    """The models of model files among these sources.

    Raises:
        ConfigError: as `load_config`.
    """
    read = _read_sources(preset, files, cluster_files, None)
    return list(dict.fromkeys(name for part in read for name in part.models))


def check_file(file: str | Path) -> FileReport:
    """Judge one file on its own, over the built-in defaults; a cluster file is known by its keys."""
    path = Path(file)
    try:
        if is_model_weights(path.stem):
            return FileReport(tuple(map(str, check_model_weights(read_file(path)))), ())
        read = read_config_file(path)
        entry, notes = _completed(_merge(None, read.entry), [read])
    except ConfigError as error:
        return FileReport((str(error),), ())
    config, found = _validate(entry, complete=False)
    if config is not None:
        serves = _serves(entry)
        clash = count_clash(config, serves, serves or config.algorithm != "single")
        found += [] if clash is None else [Problem(source_of(("cluster", "num_workers"), entry), clash)]
    if config is None or found:
        return FileReport(tuple(map(str, in_order(found))), ())
    warnings = in_order([*notes, *_automatic(config, entry), *_warnings(config, entry)])
    return FileReport((), tuple(map(str, warnings)))


def preset_names() -> list[str]:
    """Names of all presets, sorted. `model_weights` lies beside them and is none: it configures no run."""
    folder = resources.files("smolcluster.config") / "presets"
    names = (item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    return sorted(name for name in names if name != MODEL_WEIGHTS)


def preset_text(name: str) -> str:
    """A preset's YAML text; its first line is a comment that says what it shows.

    Raises:
        ConfigError: there is no such preset.
    """
    names = preset_names()
    if name not in names:
        guess = nearest(name, names)
        hint = f"; nearest: {guess}" if guess else ""
        raise ConfigError(f"unknown preset {name}{hint} (all: smolcluster config list)")
    return (resources.files("smolcluster.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def flag_name(key: str) -> str:
    """The command line's option for a dotted key: `training.max_steps` → `--max-steps`."""
    return "--" + key.rsplit(".", 1)[-1].replace("_", "-")


def read_config_file(path: Path, is_cluster: bool = False, model: str | None = None) -> Translated:
    """Read one YAML file and bring it into the shape of the schema. Not validated yet.

    Args:
        path: the file.
        is_cluster: all keys outside sections belong to `cluster`; else only where one of them is a key of it.
        model: of a model file, see `load_config`.

    Raises:
        ConfigError: the file is missing, not a YAML mapping, or no configuration of a run.
    """
    if is_model_weights(path.stem):
        raise ConfigError(f"{path}: lists published weights (serving.weights_model_name); it configures no run")
    read = translate(read_file(path), path.stem, f"name of {path}", model)
    return replace(read, entry=_shaped(read.entry, is_cluster))


# --- sources of values


def _read_sources(
    preset: str | None, files: Sequence[str | Path], cluster_files: Sequence[str | Path], model: str | None
) -> list[Translated]:
    read = [] if preset is None else [_read_preset(preset, model)]
    read += [read_config_file(Path(file), model=model) for file in files]
    return read + [read_config_file(Path(file), is_cluster=True, model=model) for file in cluster_files]


def _read_preset(name: str, model: str | None) -> Translated:
    where = f"preset {name}"
    read = translate(read_value(preset_text(name), where), name, f"name of {where}", model)
    # How the texts that we ship are read is for their comments: whoever uses one did not write it.
    quiet = tuple(replace(item, note=None) for item in read.implied)
    return replace(read, entry=_shaped(read.entry, is_cluster=False), implied=quiet, notes=())


def _base(config: Config, name: str) -> Entry:
    """All values of a configuration as one source. Without what its model has no use for: that would only warn."""
    values = config.model_dump(mode="json")
    used = MODEL_KEYS.get(config.model.type, values["model"])
    values["model"] = {key: value for key, value in values["model"].items() if key in used}
    return _entry(values, Source(name))


def _shaped(entry: Entry, is_cluster: bool) -> Entry:
    """Put the keys of a flat cluster file under `cluster`."""
    keys = entry.mapping()
    if not is_cluster and not any(key in ClusterConfig.model_fields for key in keys):
        return entry
    flat = {key: below for key, below in keys.items() if key not in Config.model_fields}
    if not flat:
        return entry
    sections = {key: below for key, below in keys.items() if key in Config.model_fields}
    nested = sections.get("cluster")
    if nested is not None:
        doubled = next((key for key in nested.mapping() if key in flat), None)
        if doubled is not None:
            raise ConfigError(f"{flat[doubled].source}: {doubled} is given here and under cluster as well")
        flat = {**nested.mapping(), **flat}
    return Entry({**sections, "cluster": Entry(flat, entry.source)}, entry.source)


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], Entry]]:
    for name in sorted(environ):
        # An empty variable counts as not set, as in most programs.
        if name.upper().startswith(ENVIRONMENT_PREFIX) and environ[name].strip():
            where = f"environment {name}"
            parts = name[len(ENVIRONMENT_PREFIX) :].split("__")
            yield _spelled(parts), read_value(environ[name], where)


def _spelled(parts: Sequence[str]) -> tuple[str, ...]:
    """Environment names have no case: find the schema's own spelling (`allToAllTopology`)."""
    path: list[str] = []
    for part in parts:
        section = section_at(path)
        known = {name.lower(): name for name in section.model_fields} if section else {}
        path.append(known.get(part.lower(), part.lower()))
    return tuple(path)


def _override(text: str) -> tuple[tuple[str, ...], Entry]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--override {text}: write KEY=VALUE, such as training.batch_size=16")
    return _path(key.strip()), read_value(value, "--override", name=f"--override {text}")


def _path(key: str) -> tuple[str, ...]:
    """Split a dotted key. Below a map with free keys the rest is one key: a host name may have dots."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        value_type = _value_type_of_map(parts[:end])
        if value_type is not None:
            is_section = isinstance(value_type, type) and issubclass(value_type, BaseModel)
            if not is_section:
                return (*parts[:end], ".".join(parts[end:]))
            if len(parts) > end + 1:
                return (*parts[:end], ".".join(parts[end:-1]), parts[-1])
    return tuple(parts)


def _value_type_of_map(path: Sequence[str]) -> Any:
    for arm in arms(type_at(path)):
        if get_origin(arm) is dict:
            return get_args(arm)[1]
    return None


def _entry(value: Any, source: Source) -> Entry:
    if isinstance(value, Mapping):
        return Entry({str(key): _entry(item, source) for key, item in value.items()}, source)
    if isinstance(value, list | tuple):
        return Entry(tuple(_entry(item, source) for item in value), source)
    return Entry(value, source)


def _refuse_difference(key: str, value: Any, overridden: Entry | None) -> None:
    other = overridden.at(_path(key)) if overridden is not None else None
    if other is not None and other.plain() != value:
        raise ConfigError(
            f"{flag_name(key)} {value} and --override {key}={other.plain()} contradict each other; "
            "give only one of them"
        )


# --- merging


def _merge(base: Entry | None, over: Entry, path: tuple[str, ...] = ()) -> Entry:
    """`over` on top of `base`: sections key by key; anything that is not a section is replaced whole."""
    section = type_at(path)
    if not _is_section(section):
        return over
    start = dict(base.mapping()) if base is not None else {}
    if over.value is None:
        # `training:` with nothing below it, or only comments, says nothing.
        return Entry(start, over.source)
    if not isinstance(over.value, Mapping):
        raise ConfigError(f"{over.source}: {dotted(path)}: got {over.plain()!r}, expected {describe(section)}")
    for key, below in over.value.items():
        start[key] = _merge(start.get(key), below, (*path, key))
    return Entry(start, over.source)


def _assign(base: Entry | None, path: Sequence[str], entry: Entry, at: tuple[str, ...] = ()) -> Entry:
    """`entry` on top of what `base` has at `path`; also single entries of a map (`cluster.buffer_size.mini1`)."""
    if len(at) == len(path):
        return _merge(base, entry, at)
    key = path[len(at)]
    start = dict(base.mapping()) if base is not None else {}
    start[key] = _assign(start.get(key), path, entry, (*at, key))
    return Entry(start, base.source if base is not None else entry.source)


def _is_section(annotation: Any) -> bool:
    # Not the optional ones (allToAllTopology): those are replaced whole, as lists are.
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _completed(top: Entry, read: Sequence[Translated]) -> tuple[Entry, list[Problem]]:
    """The merged sources with what they imply, under the schema's names; and how that was read."""
    notes = [note for part in read for note in part.notes]
    implied = [item for part in reversed(read) for item in part.implied]
    for item in [*implied, *implied_model(top)]:
        if top.at(item.path) is None:
            top = _assign(top, item.path, item.entry)
            notes += [] if item.note is None else [item.note]
    top, renamed = with_own_names(top)
    return top, [*filter(_is_the_users, [*notes, *renamed])]


def _is_the_users(problem: Problem) -> bool:
    return problem.source is None or not problem.source.where.startswith("preset ")


# --- judging


def _resolve(top: Entry, notes: Sequence[Problem]) -> Resolved:
    config, found = _validate(top, complete=True)
    if config is None or found:
        more = f"\nand {len(found) - 1} more (smolcluster config check FILE lists all of a file)" if found[1:] else ""
        raise ConfigError(f"{found[0]}{more}")
    warnings = in_order([*notes, *_warnings(config, top)])
    return Resolved(config, dict(_sources(config, top)), tuple(map(str, warnings)), tuple(map(str, notes)))


def _validate(top: Entry, complete: bool) -> tuple[Config | None, list[Problem]]:
    """The configuration and what is wrong with it. Not complete: other files may add the keys that are missing."""
    collected: list[Contradiction] = []
    try:
        config = Config.model_validate(top.plain(), context={"contradictions": collected})
    except ValidationError as error:
        return None, problems(error, top)
    counted = [c for c in collected if complete or not c.between_files or all(map(_given_in(top), c.keys))]
    return config, in_order(_contradiction(c, top) for c in counted)


def _given_in(top: Entry) -> Callable[[str], bool]:
    return lambda key: top.at(key.split(".")) is not None


def _contradiction(contradiction: Contradiction, top: Entry) -> Problem:
    """Reported at its first key that was written anywhere; another key's place stands behind if it is elsewhere."""
    text = f"{written(contradiction.keys[0].split('.'), top)}: {contradiction.text}"
    given = {key: entry.source for key in contradiction.keys if (entry := top.at(key.split("."))) is not None}
    if not given:
        return Problem(None, text)
    key, *others = given
    behind = [f"{other}: {given[other]}" for other in others if given[other].where != given[key].where]
    return Problem(given[key], f"{text} ({', '.join(behind)})" if behind else text)


def _sources(config: Config, top: Entry, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    section = section_at(path)
    assert section is not None
    for name in section.model_fields:
        below = (*path, name)
        if _is_section(type_at(below)):
            yield from _sources(config, top, below)
            continue
        entry = top.at(below)
        if entry is None:
            yield dotted(below), _unset(config, below)
            continue
        yield dotted(below), str(entry.source)
        yield from _sources_of_map(entry, below)


def _unset(config: Config, path: Sequence[str]) -> str:
    """Where the value of a key comes from that nobody has given."""
    key = dotted(path)
    if key not in _FOLLOWS:
        return "default"
    section = getattr(config, path[0])
    is_default = getattr(section, path[1]) == type(section).model_fields[path[1]].default
    return "default" if is_default else f"follows {_FOLLOWS[key]}"


def _sources_of_map(entry: Entry, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, below in entry.mapping().items():
        yield dotted((*path, key)), str(below.source)
        yield from _sources_of_map(below, (*path, key))


# --- what is read but probably not meant


def _warnings(config: Config, top: Entry) -> list[Problem]:
    serves = _serves(top)
    read = [Problem(source_of(path, top), text) for path, text in readings(config, serves)]
    found = [*filter(_is_the_users, read), *_repeated(config, top)]
    found += [Problem(source_of(path, top), text) for path, text in address_clashes(config, serves)]
    min_lr = top.at(("lr_schedule", "min_lr"))
    if min_lr is not None and config.lr_schedule.kind == "constant" and config.lr_schedule.min_lr:
        found.append(Problem(min_lr.source, "lr_schedule.min_lr: has no effect with lr_schedule.kind constant"))
    too_large = memory_warning(config)
    if too_large is not None:
        found.append(Problem(source_of(("model",), top), too_large))
    return in_order([*found, *_idle_model_keys(config, top)])


def _serves(top: Entry) -> bool:
    """A file for serving names no algorithm, but ports of the serving process."""
    return top.at(("algorithm",)) is None and top.at(("cluster", "web_interface")) is not None


def _repeated(config: Config, top: Entry) -> Iterator[Problem]:
    """Keys of a cluster file that repeat what the model's section says, and say something else."""
    layers, name = top.at(("cluster", "num_layers")), top.at(("cluster", "model_name"))
    if layers is not None and top.at(("model", "num_layers")) is not None:
        model_layers, cluster_layers = config.model.num_layers, config.cluster.num_layers
        if cluster_layers is not None and model_layers != cluster_layers:
            text = f"cluster.num_layers: {cluster_layers} is ignored, model.num_layers {model_layers} counts"
            yield Problem(layers.source, text)
    model_name, kind = config.cluster.model_name, config.model.type
    if name is None or model_name is None or top.at(("model", "type")) is None or model_type_of(model_name) == kind:
        return
    text = f"cluster.model_name: {printable(model_name)} is ignored, model.type {kind} counts"
    yield Problem(name.source, text)


def _automatic(config: Config, top: Entry) -> Iterator[Problem]:
    """What null means for the keys where it stands for a number that follows from others."""
    for key, resolved in _AUTOMATIC.items():
        entry = top.at(key.split("."))
        if entry is None or entry.value is not None:
            continue
        if key == "training.epochs" and config.training.max_steps is not None:
            continue
        yield Problem(entry.source, f"{written(key.split('.'), top)}: null is read as {resolved(config)}")


def _idle_model_keys(config: Config, top: Entry) -> Iterator[Problem]:
    """Keys of `model` that its type does not use, where one file says both: from two files it may be meant.

    Not those that have their default, as in the config.yaml of a run.
    """
    model, kind = top.at(("model",)), top.at(("model", "type"))
    used = MODEL_KEYS.get(config.model.type)
    if model is None or kind is None or used is None:
        return
    for key, entry in model.mapping().items():
        field = ModelConfig.model_fields.get(key)
        is_default = field is not None and getattr(config.model, key) == field.default
        if key not in used and not is_default and entry.source.where == kind.source.where:
            yield Problem(entry.source, f"model.{key}: has no effect with model.type {config.model.type}")
