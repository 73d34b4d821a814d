"""Messages of a conversation to the text that a model continues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smolcluster.errors import ServingError
from smolcluster.kinds import JsonValue

Message = Mapping[str, JsonValue]
_FILES = ("tokenizer_config.json", "chat_template.jinja")
# For models that were never taught to converse: lines that say who speaks, and nothing where only one speaks.
_PLAIN = (
    "{% if messages | length == 1 and messages[0].role == 'user' %}{{ messages[0].content }}{% else %}"
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}{% endif %}"
)


class ChatTemplate:
    """A model's own way to write a conversation down, or a plain one."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """Compile it.

        Args:
            source: Jinja, as in `chat_template` of tokenizer_config.json; None: the plain one.
            special_tokens: `bos_token` and the like, which templates name.

        Raises:
            ServingError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.is_own = source is not None
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(_PLAIN if source is None else source)
        except TemplateError as exc:
            raise ServingError(f"the model's chat template cannot be read ({exc}). Mend tokenizer_config.json") from exc

    def __call__(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant's answer begins.

        Raises:
            ServingError: the template does not take these messages; says why.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError) as exc:
            raise ServingError(f"the model's chat template does not take these messages: {exc}") from exc


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of a model's folder; the plain one if it has none."""
    content: JsonValue = {}
    if (folder / _FILES[0]).is_file():
        content = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
    settings = content if isinstance(content, dict) else {}
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if (folder / _FILES[1]).is_file():
        source = (folder / _FILES[1]).read_text(encoding="utf-8")
    special = {}
    for name, value in settings.items():
        if name.endswith("_token"):
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
    return ChatTemplate(source if isinstance(source, str) else None, special)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
