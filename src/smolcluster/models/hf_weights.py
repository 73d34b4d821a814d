"""Where the values of a model of transformers lie in a folder's files, and how some of them are read by themselves.

Names in a file may be others than in the model, and transformers makes one tensor of several, as of a layer's experts.
Its own rules for that are used here, tensor by tensor, so that nobody has to read the whole model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.hub import first_line
from smolcluster.models.hf import HFModel, conversions_of, is_converter, loaded_name
from smolcluster.models.tensor_files import StoredTensor, TensorFiles

# How many names an error lists.
_NAMED = 3


@dataclass(slots=True)
class _Source:
    """Tensors of the files that become one or more tensors of the model.

    Attributes:
        first: the model's name for it; of several the first.
        rule: transformers' conversion; None: one tensor, taken as it is.
        stored: their names in the files, each with the pattern of the rule that it matches, in their natural order.
    """

    first: str
    rule: Any = None
    stored: list[tuple[str, str]] = field(default_factory=list)

    def make(self, get: Callable[[str], Tensor], inner: Any) -> dict[str, Tensor]:
        """The model's tensors by name."""
        if self.rule is None:
            return {self.first: get(self.stored[0][0])}
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.stored:
            rule.add_tensor(self.first, name, pattern, get(name))
        made = rule.convert(self.first, model=inner, config=inner.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


class StoredWeights:
    """The tensors of a model by their names in it, each where it lies in the files."""

    def __init__(self, model: HFModel, files: TensorFiles, where: str) -> None:
        """Find all of them; nothing is read.

        Args:
            model: its parameters on the meta device.
            files: of its folder.
            where: the folder, for messages.

        Raises:
            ConfigError: some are missing or of another shape.
        """
        self._inner = model.inner
        self._where = where
        own = model.state_dict(keep_vars=True)
        self._sources: dict[str, list[_Source]] = {}
        by_id: dict[int, list[_Source]] = {}
        for source in _find_sources(model, files.tensors, own, where):
            for name, shape in self._shapes(source, files.tensors).items():
                if name not in own:
                    continue
                if own[name].shape != shape:
                    raise ConfigError(
                        f"{name} in {where} has shape {tuple(shape)}, but its config.json says "
                        f"{tuple(own[name].shape)}. Copy the folder again"
                    )
                by_id.setdefault(id(own[name]), []).append(source)
        ignored = _ignored(self._inner)
        missing = [name for name, tensor in own.items() if id(tensor) not in by_id and not ignored(name)]
        if missing:
            raise ConfigError(
                f"{where} lacks {len(missing)} of the tensors that transformers' {type(self._inner).__name__} has "
                f"({', '.join(missing[:_NAMED])}), or has them in a form that cannot be read in parts. It cannot be "
                "served yet"
            )
        # A tied tensor under each of its names; whoever asks knows its first.
        self._sources = {name: by_id[id(tensor)] for name, tensor in own.items() if id(tensor) in by_id}
        self._aliases = {name: {other for other, same in own.items() if same is tensor} for name, tensor in own.items()}

    def read(self, files: TensorFiles, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors, on the CPU, in the files' dtypes; blocks. Those that the files lack are left out.

        Raises:
            CheckpointError: a file is damaged.
            ConfigError: a tied tensor lies there twice, and not with the same values.
        """
        wanted = [name for name in names if name in self._sources]
        made: dict[int, dict[str, Tensor]] = {}
        found = {}
        for name in wanted:
            places = []
            for source in self._sources[name]:
                if id(source) not in made:
                    made[id(source)] = self._make(source, files)
                places += [made[id(source)][key] for key in self._aliases[name] & made[id(source)].keys()]
            if any(not _same_values(places[0], other) for other in places[1:]):
                raise ConfigError(
                    f"{name} is used in several places, but {self._where} has different values for them. It cannot "
                    "be served yet"
                )
            found[name] = places[0]
        return found

    def _make(self, source: _Source, files: TensorFiles) -> dict[str, Tensor]:
        try:
            return source.make(files.read, self._inner)
        except (RuntimeError, ValueError, TypeError, LookupError) as exc:
            raise CheckpointError(
                f"{source.first} in {self._where} cannot be put together ({first_line(exc)}). Copy the folder again"
            ) from exc

    def _shapes(self, source: _Source, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Size]:
        """Of what a source becomes: it is put together without values."""

        def without_values(name: str) -> Tensor:
            return torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta")

        try:
            return {name: tensor.shape for name, tensor in source.make(without_values, self._inner).items()}
        except (RuntimeError, ValueError, TypeError, LookupError) as exc:
            raise ConfigError(
                f"{source.first} in {self._where} cannot be put together of {len(source.stored)} tensors "
                f"({first_line(exc)}). It cannot be served yet"
            ) from exc


def _find_sources(model: HFModel, stored: Collection[str], own: Mapping[str, Tensor], where: str) -> Iterable[_Source]:
    conversions = conversions_of(model.inner)
    if conversions is None:
        raise ConfigError(f"this version of transformers does not say how it reads {where}. Install a newer one")
    rules = {pattern: rule for rule in conversions if is_converter(rule) for pattern in rule.source_patterns}
    prefix = model.inner.base_model_prefix
    merged: dict[str, _Source] = {}
    for name in sorted(stored, key=_natural_order):
        target, pattern = loaded_name(name, own, prefix, conversions)
        if pattern is None:
            yield _Source(target, None, [(name, "")])
        else:
            merged.setdefault(target, _Source(target, rules[pattern])).stored.append((name, pattern))
    yield from merged.values()


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _ignored(inner: Any) -> Callable[[str], bool]:
    """Names that transformers does not miss either."""
    patterns = [re.compile(pattern) for pattern in inner._keys_to_ignore_on_load_missing or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
