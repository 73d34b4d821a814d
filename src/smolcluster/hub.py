"""Hugging Face's hub: what has an id there, as a folder on this machine; and libraries that come with an extra.

Everything above reads folders only. So nothing that the network holds is executed, and what was loaded once loads
again without a network.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smolcluster.errors import ConfigError

# "gpt2" or "openai-community/gpt2"; nothing that is meant as a path.
_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
# The hub's own library tries for 20 s and more, file by file, before it says that there is no network.
REACH_TIMEOUT = 5.0


def import_extra(module: str, what: str, extra: str = "hf") -> Any:
    """A library that the base install lacks.

    Args:
        module: its name.
        what: who needs it, for the message: "model.type hf".
        extra: the extra of smolcluster that brings it.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise ConfigError(f'{what} needs {module} ({exc}). Install it: pip install "smolcluster[{extra}]"') from exc


def is_id(name: str) -> bool:
    """Whether a name may be a Hugging Face id; whether there is such a one, only the hub knows."""
    return _ID.fullmatch(name) is not None


def find_folder(
    name: str, *, key: str, patterns: Sequence[str], is_whole: Callable[[Path], bool], revision: str | None = None
) -> Path:
    """The folder that a user named: a local one, or one of the hub in this machine's cache. May block on a download.

    Args:
        name: a folder, or a Hugging Face id.
        key: the configuration key that it stands in, for messages.
        patterns: which files are downloaded.
        is_whole: whether a cached folder has all that is needed; otherwise it is downloaded.
        revision: of an id: its commit, tag or branch. None: the newest.

    Raises:
        ConfigError: there is no such folder or id, or no network to ask.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_id(name):
        raise ConfigError(f"{key} is {name}, but there is no such folder. Name a folder or a Hugging Face id")
    hub = import_extra("huggingface_hub", f"{key} {name}, a Hugging Face id,")
    wanted = {"allow_patterns": [*patterns], **({} if revision is None else {"revision": revision})}
    called = name if revision is None else f"{name} at revision {revision}"
    with contextlib.suppress(OSError, ValueError):
        cached = Path(hub.snapshot_download(name, **wanted, local_files_only=True))
        if is_whole(cached):
            return cached
    endpoint = hub.constants.ENDPOINT
    reason = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else why_unreachable(endpoint)
    if reason is not None:
        raise ConfigError(
            f"{key} is {called}: no folder here and not in the cache of Hugging Face, and {endpoint} cannot be reached "
            f"({reason}). Connect this machine, or name a local folder"
        )
    try:
        return Path(hub.snapshot_download(name, **wanted))
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"{key} is {called}, which cannot be downloaded from {endpoint} ({first_line(exc)}). Check the id, or "
            "name a local folder"
        ) from exc


def why_unreachable(url: str) -> str | None:
    """Why nobody answers at an address within REACH_TIMEOUT; None: somebody does, whatever the answer. Blocks."""
    reasons: list[str | None] = []
    # On a thread: looking a name up has no limit of its own, and each of a name's addresses has the whole one.
    asking = threading.Thread(target=lambda: reasons.append(_ask(url)), name="reach", daemon=True)
    asking.start()
    asking.join(REACH_TIMEOUT)
    return reasons[0] if reasons else f"no answer within {REACH_TIMEOUT:g} s"


def _ask(url: str) -> str | None:
    import http.client
    import ssl
    import urllib.error
    import urllib.request  # pulls in http, ssl and email: 50 ms that only a download has to pay

    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=REACH_TIMEOUT).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None
    except OSError as exc:
        cause = getattr(exc, "reason", exc)
        # The hub's library has certificates of its own, which Python lacks on some machines.
        return None if isinstance(cause, ssl.SSLError) else str(getattr(cause, "strerror", None) or cause)
    return None


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a line of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings; what is wrong is said by our errors. Restores both."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
