"""YAML text → values that know where they were written.

Scalars are read as YAML 1.2 does: `6e-4` is a number, and only true and false are booleans, so that `wandb: off`
means the word off. (Where the schema wants a boolean, yes, no, on and off are accepted too.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from smolcluster.errors import ConfigError

Scalar: TypeAlias = "bool | int | float | str | None"
PlainValue: TypeAlias = "Scalar | list[PlainValue] | dict[str, PlainValue]"

# Far above any configuration; what is larger was named by mistake (weights, a device) or written to do harm.
MOST_BYTES = 4 * 1024 * 1024
# Values after aliases are written out: nine nested lists of nine aliases would be 387 million.
MOST_VALUES = 100_000
# Characters of a value that a message shows.
SHOWN = 60

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    (
        "float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+0123456789."),
    ),
    ("merge", re.compile(r"<<"), ["<"]),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value was written: a file and line, a preset, an environment variable or an option.

    Attributes:
        where: the file, or what else it is.
        line: in the file, from 1; None: not a file.
        key: the key as the user wrote it, where that is not the schema's: `num_epochs`.
    """

    where: str
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        return self.where if self.line is None else f"{self.where}:{self.line}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value with its source. Mappings and lists hold entries; a mapping's keys are text."""

    value: Scalar | tuple[Entry, ...] | Mapping[str, Entry]
    source: Source

    def child(self, part: str | int) -> Entry | None:
        """The entry under a key or list index; None if there is none."""
        if isinstance(self.value, Mapping):
            return self.value.get(str(part))
        if isinstance(self.value, tuple) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

    def at(self, path: Sequence[str | int]) -> Entry | None:
        """The entry at a path of keys and list indices; None if there is none."""
        here: Entry | None = self
        for part in path:
            here = here.child(part) if here is not None else None
        return here

    def mapping(self) -> Mapping[str, Entry]:
        """The keys of a mapping; none for anything else."""
        return self.value if isinstance(self.value, Mapping) else {}

    def plain(self) -> PlainValue:
        """The value without its sources."""
        if isinstance(self.value, Mapping):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, tuple):
            return [entry.plain() for entry in self.value]
        return self.value


def read_file(path: Path) -> Entry:
    """Read a YAML file whose top level is a mapping; an empty file is an empty mapping.

    Args:
        path: the file, UTF-8.

    Raises:
        ConfigError: missing, unreadable or too large, not YAML, a doubled key, or not a mapping.
    """
    entry = _Reader(str(path)).read(_text(path))
    if entry.value is None:
        return Entry({}, entry.source)
    if not isinstance(entry.value, Mapping):
        kind = "a list" if isinstance(entry.value, tuple) else f"only {shown(entry.value)}"
        raise ConfigError(f"{entry.source}: expected `key: value` lines, found {kind}")
    return entry


def read_value(text: str, where: str, name: str | None = None) -> Entry:
    """Read YAML text that stands in no file of the user's: an override, an environment variable, a preset.

    Args:
        text: the YAML.
        where: the source of all values.
        name: what an error calls the text; None: `where`.

    Raises:
        ConfigError: it is not YAML.
    """
    return _Reader(name or where, where).read(text)


def shown(value: object) -> str:
    """A value for a message: on one line, and not longer than it helps."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def printable(name: str) -> str:
    """A key for a message: as it stands, or quoted with escapes where it would break the line."""
    return name if name and name.isprintable() and len(name) <= SHOWN else shown(name)


class _Loader(yaml.SafeLoader):
    """SafeLoader up to the node graph, with YAML 1.2's scalars. Its constructors are not used."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute


class Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""


for _name, _pattern, _first in _RESOLVERS:
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, _first)
    Dumper.add_implicit_resolver(_TAG + _name, _whole, _first)


class _Reader:
    """Turns one YAML text into entries."""

    def __init__(self, name: str, where: str | None = None) -> None:
        """`where`: the source of all values; None: the lines of the file `name`."""
        self._name = name
        self._where = where
        self._open: set[int] = set()
        self._values = 0

    def read(self, text: str) -> Entry:
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
            finally:
                loader.dispose()
            if node is None:
                return Entry(None, self._source(None))
            return self._entry(node, self._source(node))
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise self._error(line, f"unreadable character U+{int(error.character):04X}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            if mark is not None and _starts_with_tab(text, mark.line):
                raise self._error(line, "a tab indents this line; YAML allows only spaces") from None
            what = error.problem or error.context or "cannot be understood"
            if what.startswith("but "):  # half of a sentence
                what = f"{error.context}, {what}"
            raise self._error(line, f"not valid YAML: {' '.join(str(what).split())}") from None
        except RecursionError:
            raise ConfigError(f"{self._name}: nested too deeply") from None

    def _entry(self, node: yaml.Node, source: Source) -> Entry:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ConfigError(f"{self._name}: more than {MOST_VALUES} values (aliases count each time); not read")
        if isinstance(node, yaml.ScalarNode):
            return Entry(self._scalar(node), source)
        if node.tag not in (_TAG + "seq", _TAG + "map"):
            raise self._error(source.line, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed")
        if id(node) in self._open:
            raise self._error(source.line, "an anchor contains itself")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Entry(tuple(self._entry(item, self._source(item)) for item in node.value), source)
            if isinstance(node, yaml.MappingNode):
                return Entry(self._mapping(node), source)
        finally:
            self._open.discard(id(node))
        raise AssertionError(f"PyYAML made a {type(node).__name__}")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            source = self._source(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node.start_mark.line + 1, "a key must be a name, not a list or a mapping")
            # The text as written: a host may be called `on` or `1`.
            key = key_node.value
            if key_node.tag == _TAG + "merge":
                merged = {**self._merged(value_node), **merged}
            elif key in entries:
                first = entries[key].source.line
                since = f" (first in line {first})" if first is not None else ""
                raise self._error(key_node.start_mark.line + 1, f"key {printable(key)} is given twice{since}")
            else:
                entries[key] = self._entry(value_node, source)
        return {**merged, **entries}

    def _merged(self, node: yaml.Node) -> dict[str, Entry]:
        """The mapping (or list of mappings, the first one wins) after `<<:`."""
        entry = self._entry(node, self._source(node))
        parts = entry.value if isinstance(entry.value, tuple) else (entry,)
        merged: dict[str, Entry] = {}
        for part in parts:
            if not isinstance(part.value, Mapping):
                raise self._error(node.start_mark.line + 1, "<< needs a mapping")
            merged = {**part.value, **merged}
        return merged

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2].lower() in ("0x", "0o") else int(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            raise self._error(node.start_mark.line + 1, f"{shown(text)} is not a valid {kind}") from None
        if kind in ("str", "merge"):
            return text
        raise self._error(node.start_mark.line + 1, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed")

    def _source(self, node: yaml.Node | None) -> Source:
        if self._where is not None:
            return Source(self._where)
        return Source(self._name, 1 if node is None else node.start_mark.line + 1)

    def _error(self, line: int | None, text: str) -> ConfigError:
        in_file = self._where is None and line is not None
        return ConfigError(f"{self._name}:{line}: {text}" if in_file else f"{self._name}: {text}")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # not read_bytes(): /dev/zero has no end
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: larger than {MOST_BYTES // 2**20} MiB; this is no configuration file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _starts_with_tab(text: str, line: int) -> bool:
    lines = text.splitlines()
    if line >= len(lines):
        return False
    return "\t" in lines[line][: len(lines[line]) - len(lines[line].lstrip())]
