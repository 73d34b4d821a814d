"""Reads a configuration from everywhere it may come from, and remembers where each value came from.

Precedence, lowest first: built-in defaults, preset, --config files, --cluster files, environment
(`SMOLCLUSTER__TRAINING__BATCH_SIZE`), --override and its short forms such as --max-steps. A later source replaces
single keys of a section; lists, and maps with free keys such as `host_ip`, it replaces whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError

from smolcluster.config.document import Entry, Source, read_file, read_value
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
)
from smolcluster.config.hosts import address_clashes
from smolcluster.config.schema import MODEL_KEYS, ClusterConfig, Config, Contradiction
from smolcluster.errors import ConfigError

ENVIRONMENT_PREFIX = "SMOLCLUSTER__"
FileKind: TypeAlias = Literal["config", "cluster", "either"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and its origin.

    Attributes:
        config: the values.
        sources: dotted key → `default`, `preset NAME`, `FILE:LINE`, `environment NAME`, `--override`, or the
            option's name, such as `--max-steps`. Has every key of the schema, and the entries of maps.
        warnings: one line each: what is read but probably not meant.
    """

    config: Config
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()


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
) -> Resolved:
    """Read, merge and validate a configuration.

    Args:
        preset: name of a preset, without `.yaml`.
        files: `--config` files, later ones win.
        cluster_files: `--cluster` files; keys outside any section belong to `cluster`. Win over `files`.
        overrides: `KEY=VALUE` texts, the key dotted, the value YAML; later ones win.
        flags: dotted key → value of an option that is a short form of an override. None: the option was not given.
        environ: environment variables; None: this process's.

    Raises:
        ConfigError: one or two lines that name the place, the key and what is accepted.
    """
    top: Entry | None = None
    if preset is not None:
        top = _merge(top, _read_preset(preset))
    for file in files:
        top = _merge(top, read_config_file(Path(file), "config"))
    for file in cluster_files:
        top = _merge(top, read_config_file(Path(file), "cluster"))
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
    return _resolve(top if top is not None else Entry({}, Source("default")))


def check_file(file: str | Path) -> FileReport:
    """Judge one file on its own, over the built-in defaults; a cluster file is known by its keys."""
    try:
        entry = _merge(None, read_config_file(Path(file), "either"))
    except ConfigError as error:
        return FileReport((str(error),), ())
    config, found = _validate(entry, complete=False)
    if config is None or found:
        return FileReport(tuple(map(str, found)), ())
    return FileReport((), tuple(map(str, _warnings(config, entry))))


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    folder = resources.files("smolcluster.config") / "presets"
    return sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))


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


def read_config_file(path: Path, kind: FileKind) -> Entry:
    """Read one YAML file and bring it into the shape of the schema. Not validated yet.

    The spec's other spellings (flat model files, old names) are to be translated here, between reading and merging.

    Raises:
        ConfigError: the file is missing, or not a YAML mapping.
    """
    return _shaped(read_file(path), kind)


# --- sources of values


def _read_preset(name: str) -> Entry:
    text = preset_text(name)
    return _shaped(read_value(text, f"preset {name}"), "either")


def _shaped(entry: Entry, kind: FileKind) -> Entry:
    """Put the keys of a flat cluster file under `cluster`."""
    keys = entry.mapping()
    is_cluster_key = {key: key in ClusterConfig.model_fields and key not in Config.model_fields for key in keys}
    if kind == "config" or (kind == "either" and not any(is_cluster_key.values())):
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


# --- judging


def _resolve(top: Entry) -> Resolved:
    config, found = _validate(top, complete=True)
    if config is None or found:
        more = f"\nand {len(found) - 1} more (smolcluster config check FILE lists all of a file)" if found[1:] else ""
        raise ConfigError(f"{found[0]}{more}")
    return Resolved(config, dict(_sources(top)), tuple(map(str, _warnings(config, top))))


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
    text = f"{contradiction.keys[0]}: {contradiction.text}"
    written = {key: entry.source for key in contradiction.keys if (entry := top.at(key.split("."))) is not None}
    if not written:
        return Problem(None, text)
    key, *others = written
    behind = [f"{other}: {written[other]}" for other in others if written[other].where != written[key].where]
    return Problem(written[key], f"{text} ({', '.join(behind)})" if behind else text)


def _sources(top: Entry, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    section = section_at(path)
    assert section is not None
    for name in section.model_fields:
        below = (*path, name)
        if _is_section(type_at(below)):
            yield from _sources(top, below)
            continue
        entry = top.at(below)
        yield dotted(below), "default" if entry is None else str(entry.source)
        if entry is not None:
            yield from _sources_of_map(entry, below)


def _sources_of_map(entry: Entry, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, below in entry.mapping().items():
        yield dotted((*path, key)), str(below.source)
        yield from _sources_of_map(below, (*path, key))


# --- what is read but probably not meant


def _warnings(config: Config, top: Entry) -> list[Problem]:
    found = [Problem(source_of(path, top), text) for path, text in address_clashes(config.cluster)]
    model, cluster = config.model, config.cluster
    model_layers, cluster_layers = top.at(("model", "num_layers")), top.at(("cluster", "num_layers"))
    if model_layers is not None and cluster_layers is not None and model.num_layers != cluster.num_layers:
        text = f"cluster.num_layers: {cluster.num_layers} is ignored, model.num_layers {model.num_layers} counts"
        found.append(Problem(cluster_layers.source, text))
    min_lr = top.at(("lr_schedule", "min_lr"))
    if min_lr is not None and config.lr_schedule.kind == "constant" and config.lr_schedule.min_lr:
        found.append(Problem(min_lr.source, "lr_schedule.min_lr: has no effect with lr_schedule.kind constant"))
    return in_order([*found, *_idle_model_keys(config, top)])


def _idle_model_keys(config: Config, top: Entry) -> Iterator[Problem]:
    """Keys of `model` that its type does not use, where one file says both: from two files it may be meant."""
    model, kind = top.at(("model",)), top.at(("model", "type"))
    used = MODEL_KEYS.get(config.model.type)
    if model is None or kind is None or used is None:
        return
    for key, entry in model.mapping().items():
        if key not in used and entry.source.where == kind.source.where:
            yield Problem(entry.source, f"model.{key}: has no effect with model.type {config.model.type}")
