"""A configuration as YAML that reads back as the same configuration: `config show`, and a run's config.yaml."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import yaml

from smolcluster.config.document import Dumper
from smolcluster.config.schema import Config, resolved_batch_size, resolved_epochs

# Comments of `config show` begin here, if the line is shorter.
_COMMENT_COLUMN = 44


def config_yaml(config: Config, sources: Mapping[str, str] | None = None) -> str:
    """All keys and values, a section at a time.

    Args:
        config: what to print.
        sources: `Resolved.sources`; each line then ends with a comment that says where its value comes from.
    """
    meanings = {"training.batch_size": str(resolved_batch_size(config))}
    if config.training.max_steps is None:
        meanings["training.epochs"] = str(resolved_epochs(config))
    lines: list[str] = []
    for text, key, value in _lines(config.model_dump(mode="json"), (), 0):
        source = (sources or {}).get(key)
        if source is None:
            lines.append(text)
            continue
        meaning = f", means {meanings[key]}" if value is None and key in meanings else ""
        comment = " ".join(f"{source}{meaning}".split())
        lines.append(f"{text:<{_COMMENT_COLUMN}}  # {comment}")
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...], indent: int) -> list[tuple[str, str, Any]]:
    """(line, dotted key of the value it begins, that value)."""
    lines: list[tuple[str, str, Any]] = []
    for name, value in values.items():
        key, blank = ".".join((*path, name)), " " * indent
        if isinstance(value, dict) and value:
            lines.append((f"{blank}{_flow(name)}:", key, value))
            lines += _lines(value, (*path, name), indent + 2)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines.append((f"{blank}{_flow(name)}:", key, value))
            lines += [(f"{blank}  - {_flow(item)}", "", item) for item in value]
        else:
            lines.append((f"{blank}{_flow(name)}: {_flow(value)}", key, value))
    return lines


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, width=sys.maxsize, allow_unicode=True, sort_keys=False
    )
    return str(text).removesuffix("...\n").strip()


class _OneLine(Dumper):
    """Text with line breaks or unprintable characters is quoted with escapes."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')

    def ignore_aliases(self, data: object) -> bool:
        return True


_OneLine.add_representer(str, _OneLine.represent_text)
