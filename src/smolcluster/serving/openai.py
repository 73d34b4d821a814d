"""OpenAI's shapes: what requests, answers, pieces of answers and errors look like.

Source    https://platform.openai.com/docs/api-reference/chat and /completions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.serving.chat_template import Message
from smolcluster.serving.sampling import Sampled
from smolcluster.serving.service import Strategy, Wishes

_MAX_SEED = 2**63 - 1


class _Body(BaseModel):
    # Clients send fields that only other servers know.
    model_config = ConfigDict(extra="ignore", strict=False, use_attribute_docstrings=True)


class StreamOptions(_Body):
    """Of a streamed answer."""

    include_usage: bool | None = False
    """The last chunk tells how many tokens the request took."""


class AnswerBody(_Body):
    """What a request may say about its answer, whatever its path."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Divides the logits; 0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Draw from so many of the likeliest tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens with at least this part of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Tokens that were there before become less likely by this factor."""
    decoding_strategy: Strategy | None = None
    """A key of `serving.decoding_strategies`. null: the active one, see `GET /config`."""
    seed: Annotated[int, Field(ge=-_MAX_SEED - 1, le=_MAX_SEED)] | None = None
    """Same seed, same answer. null: another one each time."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of the answer. null: `serving.max_new_tokens`, or what there is room for."""
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    """Strings that end the answer, and are no part of it."""

    def wishes(self) -> Wishes:
        """The same for the service."""
        return Wishes(
            strategy=self.decoding_strategy,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed % (_MAX_SEED + 1),
            max_tokens=self.max_tokens,
            stops=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )


class _Completion(AnswerBody):
    """What chat and plain completions have in common."""

    model: str
    """The id of the served model, see `GET /v1/models`."""
    stream: bool | None = False
    """Server-sent events while it is written, at last `data: [DONE]`."""
    stream_options: StreamOptions | None = None
    """Of a streamed answer."""
    n: Literal[1] | None = 1
    """Answers."""
    presence_penalty: Literal[0] | None = 0
    """Not served: see `repetition_penalty`."""
    frequency_penalty: Literal[0] | None = 0
    """Not served: see `repetition_penalty`."""
    user: str | None = None
    """Not used."""

    @property
    def wants_usage(self) -> bool:
        """In a stream: to be told at its end what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ContentPart(_Body):
    """A piece of a message; text is all that this server takes."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks; `developer` is taken for `system`."""
    content: str | list[ContentPart] | None = None
    """What was said. null: nothing."""
    name: str | None = None
    """Not used."""

    def plain(self) -> Message:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content or ""}


class ChatRequest(_Completion):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    """The conversation, oldest first."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`; it wins."""
    logprobs: bool | None = None
    """Tell each token's logarithmic probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With `logprobs`: also of so many of the likeliest ones."""

    def wishes(self) -> Wishes:
        """What it says about its answer."""
        return replace(
            super().wishes(),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Completion):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
    )
    """A text, or token ids; also a list with one text."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Tell each token's logarithmic probability, and of so many of the likeliest ones."""
    echo: Literal[False] = False
    """Not served: the answer does not repeat the prompt."""
    best_of: Literal[1] | None = None
    """Not served."""

    def text_or_ids(self) -> str | list[int]:
        """The one prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [part for part in self.prompt if isinstance(part, str)]
        return texts[0] if texts else [part for part in self.prompt if isinstance(part, int)]

    def wishes(self) -> Wishes:
        """What it says about its answer."""
        return replace(super().wishes(), logprobs=self.logprobs)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> JsonObject:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def told_wrong(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What is wrong with a body, and the field that is.

    Args:
        errors: pydantic's. A field that may be of several types has one for each; that of the right type with a wrong
            value says most.
    """
    field = _field(errors[0]["loc"])
    of_field = [error for error in errors if _field(error["loc"]).startswith(field)]
    chosen = next((error for error in of_field if not error["type"].endswith("_type")), errors[0])
    if chosen["type"] == "json_invalid":
        return f"the body is not JSON: {chosen['ctx']['error']}", None
    if field := _field(chosen["loc"]):
        return f"{field}: {chosen['msg']}", field
    return "there is no body" if chosen["type"] == "missing" else chosen["msg"].removeprefix("Value error, "), None


def _field(location: Sequence[str | int]) -> str:
    """Its path in the body, without what pydantic calls the types that it may have."""
    types = ("body", "str", ContentPart.__name__)
    return ".".join(
        str(part) for part in location if isinstance(part, int) or (part.isidentifier() and part not in types)
    )


def usage(prompt: int, answer: int) -> JsonObject:
    """Tokens that a request took."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def chat_logprobs(tokens: Sequence[Sampled], text_of: Callable[[int], str]) -> JsonObject:
    """Of tokens that were sampled with them; `text_of`: a token's text."""

    def entry(token: int, logprob: float) -> JsonObject:
        text = text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content: list[JsonValue] = []
    for sampled in tokens:
        top: list[JsonValue] = [entry(token, logprob) for token, logprob in sampled.top]
        content.append({**entry(sampled.token, sampled.logprob or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[Sampled], text_of: Callable[[int], str], offset: int
) -> tuple[JsonObject, int]:
    """The older shape, of plain completions; `offset`: characters before these tokens. Also the next offset."""
    texts: list[JsonValue] = []
    offsets: list[JsonValue] = []
    top: list[JsonValue] = []
    for sampled in tokens:
        text = text_of(sampled.token)
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
        top.append({text_of(token): logprob for token, logprob in sampled.top})
    found: JsonObject = {
        "tokens": texts,
        "token_logprobs": [sampled.logprob for sampled in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return found, offset
