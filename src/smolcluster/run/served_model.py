"""Which model `smolcluster serve` and `generate` serve: a folder, an id, a key of a model file; and its files, checked.

    --model FOLDER or ID                    that one
    --model KEY, or none   1  serving.hf_model_name, if it is a folder of this machine
                           2  serving.weights_model_name: a folder, or a key of model_weights.yaml, which says id or
                              address, revision and SHA-256
                           3  serving.hf_model_name as a Hugging Face id

An address has weights alone. They are put together with configuration and tokenizer of serving.hf_model_name, or with
those that lie beside them at the address, in a folder of the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from smolcluster.config.explain import nearest
from smolcluster.config.load import MODEL_PRESET, load_config, model_keys
from smolcluster.config.schema import Config, ServingConfig
from smolcluster.config.weights import WeightsSource, find_weights, read_weights
from smolcluster.data.download import keep_file
from smolcluster.data.root import ENVIRONMENT_KEY, data_root
from smolcluster.data.tokenizer import FILES, TOKENIZER, has_tokenizer
from smolcluster.errors import ConfigError
from smolcluster.hub import find_folder, is_id
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.folder import CONFIG, WEIGHTS, WEIGHTS_INDEX, model_folder, weight_files
from smolcluster.run.weights_file import Checksums, check_sha256, fetch_small, fetch_weights, shown_url

if TYPE_CHECKING:
    import urllib.request

# What a model is besides its weights.
_BESIDES = (CONFIG, "generation_config.json", *FILES)
_TABLE = "model_weights.yaml"


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user asked for; nothing has been looked for yet but the folder.

    Attributes:
        config: the configuration; the model of a model file is its section `serving`.
        name: the folder or Hugging Face id of --model; None: the section says which model.
        tables: the user's tables of weights, which come before the one that ships with the package.
        hint: what else the name may have meant, for a message.
    """

    config: Config
    name: str | None
    tables: tuple[Path, ...] = ()
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model whose files are all there.

    Attributes:
        folder: with configuration, weights and tokenizer.
        id: what it is called in the API.
    """

    folder: Path
    id: str


def choose_model(
    model: str | None,
    say: Callable[[str], None],
    *,
    preset: str | None = None,
    files: Sequence[Path] = (),
    cluster_files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    flags: dict[str, Any] | None = None,
) -> Choice:
    """Read the configuration with the model that the user named. Downloads nothing.

    Args:
        model: --model: a folder, a key of a model file, or a Hugging Face id, looked for in this order.
        say: tells the user.
        preset, files, cluster_files, overrides, flags: see `load_config`.

    Raises:
        ConfigError: the configuration has a mistake, or there is no such model.
    """
    own = model_keys(preset, files, cluster_files)
    is_folder = model is not None and Path(model).expanduser().is_dir()
    known = list(dict.fromkeys([*own, *model_keys(MODEL_PRESET)]))
    key = model if model in known and not is_folder else None
    if model is not None and key is None and not is_folder and not is_id(model):
        raise ConfigError(
            f"--model is {model}, but there is no such folder, no such key of a model file ({', '.join(known)}"
            f"{_nearest(model, known, '; nearest: ')}), and it is no Hugging Face id. Name one of these"
        )
    if model is None and len(own) > 1:
        say(f"warning: of the models {', '.join(own)} a file's first is read; choose one with --model KEY")
    config = load_config(preset, files, cluster_files, overrides, flags, model=key).config
    tables = [Path(file).parent / _TABLE for file in reversed([*files, *cluster_files])]
    may_be_key = model is not None and key is None and not is_folder and "/" not in model
    return Choice(
        config,
        model if key is None else None,
        tuple(dict.fromkeys(table for table in tables if table.is_file())),
        _nearest(str(model), known, ". Nearest key of a model file: ") if may_be_key else "",
    )


def find_model(
    choice: Choice, say: Callable[[str], None], opener: urllib.request.OpenerDirector | None = None
) -> ServedModel:
    """Have all files of the chosen model on this machine; blocks, perhaps for a download.

    Args:
        choice: of choose_model.
        say: tells the user.
        opener: what opens addresses of weights; None: https alone.

    Raises:
        ConfigError: a part of it cannot be had, or is not what was published.
    """
    serving = choice.config.serving
    try:
        served = _find(choice, serving, say, opener)
    except ConfigError as exc:
        if not choice.hint:
            raise
        raise ConfigError(f"{exc}{choice.hint}") from exc
    told = serving.num_layers
    found = None if told is None else read_decoder_config(served.folder)
    if found is not None and found.num_layers != told:
        say(f"warning: serving.num_layers is {told}, but {served.id} has {found.num_layers} layers, which count")
    return served


def note_stages(serving: ServingConfig, say: Callable[[str], None], others: str = "") -> None:
    """Say that a model for several nodes is served by this process alone.

    Args:
        serving: the section.
        say: tells the user.
        others: how else than with --local it could have several: " or --cluster FILE".
    """
    count = serving.num_nodes
    if count is not None and count > 1:
        say(f"serving.num_nodes is {count}, but this is one process: {count} stages need --local {count}{others}")


def hub_folder(name: str, *, key: str, revision: str | None = None) -> Path:
    """The folder of a model with all that serving needs; blocks, perhaps for a download.

    Args:
        name: a folder, or a Hugging Face id.
        key: what the user named it with, for messages.
        revision: of an id; None: the newest.

    Raises:
        ConfigError: it cannot be had, or has no config.json.
    """
    folder = find_folder(
        name,
        key=key,
        patterns=[*_BESIDES, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors"],
        is_whole=lambda folder: (folder / CONFIG).is_file() and _has_weights(folder) and has_tokenizer(folder),
        revision=revision,
    )
    return model_folder(str(folder), with_weights=True, key=key)


def model_id(name: str) -> str:
    """What a model is called in the API: the last part of its folder, or its Hugging Face id."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


# --- the order


def _find(
    choice: Choice, serving: ServingConfig, say: Callable[[str], None], opener: urllib.request.OpenerDirector | None
) -> ServedModel:
    if choice.name is not None:
        return _named(choice.name, "--model")
    name, weights = serving.hf_model_name, serving.weights_model_name
    folder = None if name is None else Path(name).expanduser()
    is_folder = folder is not None and folder.is_dir()
    if name is not None and (weights is None or (is_folder and _has_weights(Path(name).expanduser()))):
        return _named(name, "serving.hf_model_name")
    if weights is None:
        raise ConfigError(
            "no model is named. Give --model a folder, a Hugging Face id or a key of a model file; or set "
            "serving.hf_model_name or serving.weights_model_name"
        )
    if (Path(weights).expanduser() / CONFIG).is_file():
        return _named(weights, "serving.weights_model_name")
    source = _source(weights, choice.tables)
    if source.url is not None:
        return _compose(weights, source, source.url, name, say, opener)
    if name is not None and is_folder:  # it has no weights, which is for its own error to say
        return _named(name, "serving.hf_model_name")
    return _published(weights, source, name, say)


def _named(name: str, key: str) -> ServedModel:
    return ServedModel(hub_folder(name, key=key), model_id(name))


def _source(weights: str, tables: Iterable[Path]) -> WeightsSource:
    for table in tables:
        found = read_weights(table).get(weights)
        if found is not None:
            return found
    try:
        return find_weights(weights)
    except ConfigError as exc:
        raise ConfigError(f"serving.weights_model_name: {exc}") from exc


def _published(weights: str, source: WeightsSource, name: str | None, say: Callable[[str], None]) -> ServedModel:
    """The model of an entry with an id."""
    published, where = source.hf_model_name, f"weights {weights} in {_TABLE}"
    assert published is not None, "an entry has an id or an address"
    if name is not None and name != published:
        say(f"serving.weights_model_name {weights} is served, which is {published}; not serving.hf_model_name {name}")
    folder = hub_folder(published, key=f"hf_model_name of {where}", revision=source.revision)
    if source.sha256 is not None:
        files = weight_files(folder)
        if len(files) > 1:
            raise ConfigError(
                f"{where} has a sha256, which is of one file, but {published} has its weights in {len(files)} files. "
                "Leave it out; a revision says which files they are"
            )
        check_sha256(files[0], source.sha256, _checksums(), where)
    return ServedModel(folder, model_id(published))


# --- weights of an address


def _compose(
    weights: str,
    source: WeightsSource,
    url: str,
    name: str | None,
    say: Callable[[str], None],
    opener: urllib.request.OpenerDirector | None,
) -> ServedModel:
    """A folder with the weights of an address, and the rest of hf_model_name's or of beside them."""
    try:
        urlsplit(url)
    except ValueError as exc:
        raise ConfigError(f"weights {weights} in {_TABLE}: {url} is no address ({exc}). Correct it") from exc
    kept = _cache() / _digest(url)
    # Its last part is the model's id; another hf_model_name has another folder, and the same weights.
    folder = _cache() / _digest(url, name or "") / (re.sub(r"[^\w\-.]+", "-", weights).strip("-.") or "model")
    if name is None:
        _fetch_besides(url, folder, opener)
    else:
        _copy_besides(name, folder)
    fetch_weights(
        url,
        kept / WEIGHTS,
        sha256=source.sha256,
        where=f"weights {weights} in {_TABLE}",
        checksums=_checksums(),
        say=say,
        opener=opener,
    )
    _link(kept / WEIGHTS, folder / WEIGHTS)
    return ServedModel(folder, folder.name)


def _copy_besides(name: str, folder: Path) -> None:
    """Make the folder's configuration and tokenizer those of a folder or id, as they are now."""
    key = "serving.hf_model_name"
    origin = find_folder(name, key=key, patterns=_BESIDES, is_whole=_has_besides)
    if not _has_besides(origin):
        raise ConfigError(
            f"{key} is {name}, but {origin} lacks {CONFIG} or a tokenizer, which weights from an address need. Name a "
            "folder or a Hugging Face id that has both"
        )
    for file in _BESIDES:
        if (origin / file).is_file():
            keep_file((origin / file).read_bytes(), folder / file)
        else:
            (folder / file).unlink(missing_ok=True)


def _fetch_besides(url: str, folder: Path, opener: urllib.request.OpenerDirector | None) -> None:
    """Download configuration and tokenizer from beside the weights, unless that has been done."""
    if folder.is_dir() and _has_besides(folder):
        return
    found = {file: content for file in _BESIDES if (content := fetch_small(urljoin(url, file), opener)) is not None}
    if not _is_object(found.get(CONFIG)):
        raise ConfigError(
            f"there is no {CONFIG} beside {shown_url(url)}, and serving.hf_model_name is not set. Set it to a folder "
            "or a Hugging Face id with the model's configuration and tokenizer"
        )
    for file in sorted(found, key=lambda file: file == CONFIG):  # last: with it the folder counts as whole
        keep_file(found[file], folder / file)
    if not has_tokenizer(folder):
        raise ConfigError(
            f"there is no {TOKENIZER} beside {shown_url(url)}, and serving.hf_model_name is not set. Set it to a "
            "folder or a Hugging Face id with the model's configuration and tokenizer"
        )


def _link(file: Path, link: Path) -> None:
    """The same file under another name; a copy on file systems without such links."""
    try:
        if link.is_file() and link.samefile(file):
            return
        temporary = link.with_name(f"{link.name}.{os.getpid()}.part")
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copy2(file, temporary)
        os.replace(temporary, link)
    except OSError as exc:
        raise ConfigError(
            f"{link} cannot be written ({exc.strerror or exc}). Make room there, or set {ENVIRONMENT_KEY} to a folder "
            "that you may write to"
        ) from exc


def _has_weights(folder: Path) -> bool:
    try:
        return all(file.is_file() for file in weight_files(folder))
    except ConfigError:
        return False


def _has_besides(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and has_tokenizer(folder)


def _is_object(content: bytes | None) -> bool:
    try:
        return isinstance(json.loads(content or b""), dict)
    except (ValueError, RecursionError):
        return False


def _cache() -> Path:
    return data_root() / "models"


def _checksums() -> Checksums:
    return Checksums(_cache() / "checksums.json")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _nearest(word: str, known: Iterable[str], before: str) -> str:
    guess = nearest(word, known)
    return f"{before}{guess}" if guess else ""
