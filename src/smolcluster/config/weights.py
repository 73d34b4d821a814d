"""The table of published weights: `model_weights.yaml`, a kind of file of its own.

Each key names weights for `serving.weights_model_name`: a Hugging Face id or a URL, and what is needed to get the same
bytes every time.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from smolcluster.config.document import Entry, read_file, read_value
from smolcluster.config.explain import Problem, nearest, problems
from smolcluster.config.schema import Accepts, Section, problem
from smolcluster.errors import ConfigError

MODEL_WEIGHTS = "model_weights"


class WeightsSource(Section):
    """Where one model's weights come from: `hf_model_name` or `url`, one of them."""

    hf_model_name: str | None = None
    """Hugging Face id of the model."""
    url: Annotated[str, Field(pattern=r"^https://\S+$"), Accepts("an address that begins with https://")] | None = None
    """Address of a safetensors file."""
    revision: str | None = None
    """hf_model_name: commit, tag or branch. null: the newest."""
    sha256: (
        Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Accepts("64 hexadecimal digits in lower case, in quotes")]
        | None
    ) = None
    """Of the safetensors file; another file is refused. null: not checked."""

    @model_validator(mode="after")
    def _one_source(self) -> WeightsSource:
        if (self.hf_model_name is None) == (self.url is None):
            raise problem("needs hf_model_name or url, and only one of them")
        if self.url is not None and self.revision is not None:
            raise problem("revision belongs to hf_model_name; a url has none")
        return self


WeightsTable: TypeAlias = dict[str, WeightsSource]


def is_model_weights(name: str) -> bool:
    """Whether a file of this name (without `.yaml`) lists weights instead of configuring a run."""
    return name.lower().startswith(MODEL_WEIGHTS)


def find_weights(key: str, path: Path | None = None) -> WeightsSource:
    """The entry of a key.

    Args:
        key: as in `serving.weights_model_name`.
        path: the user's table; None: the one that ships with the package.

    Raises:
        ConfigError: the table has a mistake, or no such key.
    """
    table = read_weights(path)
    if key not in table:
        guess = nearest(key, table)
        hint = f"; nearest: {guess}" if guess else ""
        raise ConfigError(f"{_called(path)} has no weights {key}{hint}; it has {', '.join(table)}")
    return table[key]


def read_weights(path: Path | None = None) -> WeightsTable:
    """A whole table.

    Args:
        path: the user's; None: the one that ships with the package.

    Raises:
        ConfigError: it has a mistake.
    """
    if path is not None:
        entry = read_file(path)
    else:
        text = (resources.files("smolcluster.config") / "presets" / f"{MODEL_WEIGHTS}.yaml").read_text(encoding="utf-8")
        entry = read_value(text, _called(None))
    found = check_model_weights(entry)
    if found:
        raise ConfigError(str(found[0]))
    return TypeAdapter(WeightsTable).validate_python(entry.plain())


def _called(path: Path | None) -> str:
    return str(path) if path is not None else f"preset {MODEL_WEIGHTS}"


def check_model_weights(entry: Entry) -> list[Problem]:
    """What is wrong with a table of weights; nothing: it is valid."""
    try:
        TypeAdapter(WeightsTable).validate_python(entry.plain())
    except ValidationError as error:
        return problems(error, entry, WeightsTable)
    return []
