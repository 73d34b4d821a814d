"""Errors of the schema in the words of the user: where, which key, what is accepted, which key was meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from smolcluster.config.document import Entry, Source, printable, shown
from smolcluster.config.schema import Accepts, Config

Part = str | int

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text (in quotes)",
    bool: "true or false",
    type(None): "null",
}

# difflib's own default cutoff: "batchsize" and "warmup" are recognised, words that share a few letters are not.
_LIKE_ENOUGH = 0.6


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, at the place where it was written (None: in no file)."""

    source: Source | None
    text: str

    def __str__(self) -> str:
        return self.text if self.source is None else f"{self.source}: {self.text}"


def problems(error: ValidationError, entry: Entry, root: Any = Config) -> list[Problem]:
    """All mistakes that pydantic found in `entry`, one line each, in the order of the files.

    Args:
        error: what pydantic raised.
        entry: what was validated.
        root: the type that it was validated as.
    """
    found: dict[tuple[Part, ...], Problem] = {}
    for details in error.errors(include_url=False):
        path = _path_in(entry, details)
        found.setdefault(path, _problem(path, details, entry, root))
    # A union reports one error per alternative; the one that got furthest into the value says most.
    inner = {path: p for path, p in found.items() if not any(_is_inside(other, path) for other in found)}
    return in_order(inner.values())


def in_order(found: Iterable[Problem]) -> list[Problem]:
    """Sorted by line within a file; files and options in the order in which they first occur."""
    listed = list(found)
    files = list(dict.fromkeys(p.source.where if p.source else "" for p in listed))
    return sorted(listed, key=lambda p: (files.index(p.source.where), p.source.line or 0) if p.source else (-1, 0))


def source_of(path: Sequence[Part], entry: Entry) -> Source | None:
    """Where the value at `path` was written, or the innermost thing around it; None if nothing of it was."""
    found = None
    here: Entry | None = entry
    for part in path:
        here = here.child(part) if here is not None else None
        if here is None:
            break
        found = here.source
    return found


def dotted(path: Sequence[Part]) -> str:
    """`cluster.workers[0]`"""
    text = ""
    for part in path:
        text = _joined(text, part)
    return text


def written(path: Sequence[Part], entry: Entry) -> str:
    """The key at `path` as the user wrote it: `num_epochs` where `training.epochs` came from a flat file."""
    text = ""
    here: Entry | None = entry
    for part in path:
        here = here.child(part) if here is not None else None
        text = here.source.key if here is not None and here.source.key is not None else _joined(text, part)
    return text


def _joined(text: str, part: Part) -> str:
    if isinstance(part, int):
        return f"{text}[{part}]"
    return f"{text}.{printable(part)}" if text else printable(part)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most probably a misspelling of."""
    scored = [(_likeness(word, name), name) for name in known]
    best = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return best[1] if best[0] >= _LIKE_ENOUGH else None


def describe(annotation: Any) -> str:
    """What a type accepts, in words: `a whole number of at least 1, or null`."""
    alternatives = _alternatives(annotation)
    *most, last = alternatives
    if not most:
        return last
    return f"{', '.join(most)}, or {last}"


def type_at(path: Sequence[Part], root: Any = Config) -> Any:
    """The annotation of the value at `path` below `root`; None if the schema has no such place."""
    annotation = root
    for part in path:
        annotation = _child(annotation, part)
        if annotation is None:
            return None
    return annotation


def section_at(path: Sequence[Part], root: Any = Config) -> type[BaseModel] | None:
    """The model whose keys stand at `path`; None for plain values, lists and maps with free keys."""
    annotation = type_at(path, root)
    return next((arm for arm in arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)), None)


def arms(annotation: Any) -> list[Any]:
    """The alternatives of a union (one, if it is none), without Annotated around them."""
    if get_origin(annotation) is Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in arms(part)]
    return [annotation]


# --- one error


def _problem(path: tuple[Part, ...], details: ErrorDetails, entry: Entry, root: Any) -> Problem:
    if details["type"] == "problem":
        path = (*path, *details.get("ctx", {}).get("below", ()))
    source = source_of(path, entry)
    key = written(path, entry)
    if details["type"] == "extra_forbidden":
        return Problem(source, _unknown_key(path, entry, root))
    if details["type"] == "missing":
        return Problem(source, f"{written(path[:-1], entry)}: the key {path[-1]} is missing")
    if details["loc"][-1:] == ("[key]",):
        key_type = next(get_args(arm)[0] for arm in arms(type_at(path[:-1], root)) if get_origin(arm) is dict)
        name = shown(path[-1])
        return Problem(source, f"{written(path[:-1], entry)}: got the key {name}, expected {describe(key_type)}")
    if details["type"] == "problem":
        return Problem(source, f"{key}: {details['msg']}" if key else details["msg"])
    return Problem(source, f"{key}: got {_shown(path, entry)}, expected {describe(type_at(path, root))}")


def _unknown_key(path: Sequence[Part], entry: Entry, root: Any) -> str:
    """The message for a key that the schema does not have, with the one that was probably meant."""
    key, word = written(path, entry), str(path[-1])
    last = printable(word)
    above = key.removesuffix(last).rstrip(".") if key.endswith(last) else written(path[:-1], entry)
    section = section_at(path[:-1], root)
    own = [f"{above}.{name}" if above else name for name in (section.model_fields if section else ())]
    places = _all_keys() if root is Config else []
    same_word = [place for place in places if _last(place) == word]
    if same_word:
        return f"unknown key {key}; nearest: {' or '.join(same_word)}"
    # A slip of the finger is likelier than a slip of the section, so the own section has a head start.
    scored = [(_likeness(word, _last(place)) + (0.1 if place in own else 0), place) for place in [*own, *places]]
    score, guess = max(scored, key=lambda pair: pair[0])
    if score >= _LIKE_ENOUGH:
        return f"unknown key {key}; nearest: {guess}"
    return f"unknown key {key}; keys of {above or 'the top level'}: {', '.join(map(_last, own))}"


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _likeness(word: str, known: str) -> float:
    initials = "".join(part[:1] for part in known.split("_"))
    if word.lower() == initials and len(initials) > 1:
        return 1.0  # lr, bs, wd
    return difflib.SequenceMatcher(None, word.lower(), known.lower()).ratio()


def _path_in(entry: Entry, details: ErrorDetails) -> tuple[Part, ...]:
    """The error's place among the user's own keys: without the names that pydantic gives to a union's arms."""
    path: list[Part] = []
    here: Entry | None = entry
    for part in details["loc"]:
        below = here.child(part) if here is not None else None
        if below is not None:
            path.append(part)
            here = below
    if details["type"] == "missing":
        path.append(details["loc"][-1])
    return tuple(path)


def _is_inside(inner: tuple[Part, ...], outer: tuple[Part, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _shown(path: Sequence[Part], entry: Entry) -> str:
    here = entry.at(path)
    if here is None:
        return "nothing"
    value = here.plain()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shown(value)


# --- the schema's types


def _all_keys() -> list[str]:
    """All keys among which a misplaced or misspelt one is looked for: `training`, `training.batch_size`, …"""
    keys: list[str] = []
    for name in Config.model_fields:
        section = section_at((name,))
        keys += [name, *(f"{name}.{key}" for key in (section.model_fields if section else ()))]
    return keys


def _child(annotation: Any, part: Part) -> Any:
    for arm in arms(annotation):
        origin, args = get_origin(arm), get_args(arm)
        if isinstance(arm, type) and issubclass(arm, BaseModel) and part in arm.model_fields:
            field = arm.model_fields[str(part)]
            # Pydantic takes Annotated apart; describe() wants it whole.
            whole = (field.annotation, *field.metadata)
            return Annotated[whole] if field.metadata else field.annotation
        if origin is dict and isinstance(part, str):
            return args[1]
        if origin in (tuple, list) and isinstance(part, int):
            return args[0]
    return None


def _alternatives(annotation: Any) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        said = [item.text for item in args[1:] if isinstance(item, Accepts)]
        return said or _bounded(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return [text for part in args for text in _alternatives(part)]
    if origin is Literal:
        return [f"one of {', '.join(map(str, args))}"]
    if origin is dict:
        return [f"a map of {'host names' if args[0] is not str else 'names'} to {_plural(args[1])}"]
    if origin in (tuple, list):
        return [f"a list of {_plural(args[0])}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [f"a section with keys such as {', '.join(list(annotation.model_fields)[:3])}"]
    return [_WORDS.get(annotation, "any value")]


def _bounded(annotation: Any, constraints: Sequence[Any]) -> list[str]:
    lowest = next((c.ge for c in constraints if isinstance(c, annotated_types.Ge)), None)
    above = next((c.gt for c in constraints if isinstance(c, annotated_types.Gt)), None)
    highest = next((c.le for c in constraints if isinstance(c, annotated_types.Le)), None)
    bounds = ""
    if lowest is not None:
        bounds = f" from {lowest} to {highest}" if highest is not None else f" of at least {lowest}"
    elif above is not None:
        bounds = f" above {above}" + (f" and at most {highest}" if highest is not None else "")
    *most, last = _alternatives(annotation)
    return [*most, last + bounds]


def _plural(annotation: Any) -> str:
    text = describe(annotation)
    for one, many in (
        ("a whole number", "whole numbers"),
        ("a number", "numbers"),
        ("an IP address or a host name", "addresses"),
        ("a host name", "host names"),
        ("a section with keys", "sections with keys"),
    ):
        if text.startswith(one):
            return many + text[len(one) :]
    return text
