"""What answers look like, for /openapi.json: documentation and generated clients. The handlers write plain objects.

Tests check what a server says against these (tests/serving/test_clients.py).

Source    https://platform.openai.com/docs/api-reference/chat and /completions
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, RootModel

from smolcluster.config.schema import DecodingStrategies
from smolcluster.serving.service import Strategy

Finish = Literal["stop", "length", "cancelled"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorReason(_Answer):
    """What is wrong."""

    message: str
    """In words."""
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    """Whose fault it is."""
    param: str | None
    """The field that is wrong."""
    code: str | None
    """`context_length_exceeded`, `model_not_found`, `invalid_api_key`, `queue_full`, `unavailable`, `not_found`,
    `answer_under_way`, `request_id_in_use` or `sessions_failed`."""


class ErrorAnswer(_Answer):
    """OpenAI's error object, whatever is wrong."""

    error: ErrorReason


class Usage(_Answer):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(_Answer):
    """A token that might have been taken."""

    token: str
    logprob: float
    """Natural logarithm of its probability by the model's own distribution, before temperature and the like."""
    bytes: list[int]
    """Of its text in UTF-8."""


class TokenLogprob(TopLogprob):
    """The token that was taken."""

    top_logprobs: list[TopLogprob]
    """The likeliest ones, likeliest first."""


class ChatLogprobs(_Answer):
    """Of the tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(_Answer):
    """What the model has written."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """The one answer."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class _Head(_Answer):
    id: str
    created: int
    """Unix time."""
    model: str
    system_fingerprint: None


class ChatCompletion(_Head):
    """A whole answer in a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    """One."""
    usage: Usage


class ChatDelta(_Answer):
    """What follows."""

    role: Literal["assistant"] | None = None
    """In the first chunk."""
    content: str | None = None


class ChatChunkChoice(_Answer):
    """Some more of the one answer."""

    index: Literal[0]
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    """In the last one."""


class ChatCompletionChunk(_Head):
    """An event of a streamed answer in a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """One; none in the chunk that has the usage."""
    usage: Usage | None = None
    """With `stream_options.include_usage`: in the last chunk."""


class CompletionLogprobs(_Answer):
    """Of the tokens of an answer, in the older shape."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each begins, in characters of the answer."""


class CompletionChoice(_Answer):
    """The one answer, or some more of it."""

    index: Literal[0]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    """null: it goes on."""


class Completion(_Head):
    """How a text goes on; also each event of a streamed answer."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    """One; none in the event that has the usage."""
    usage: Usage | None = None
    """Of a stream: with `stream_options.include_usage`, in the last event."""


class ModelCard(_Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    """Unix time at which it began to be served."""
    owned_by: Literal["smolcluster"]


class ModelList(_Answer):
    """All models of this server: one."""

    object: Literal["list"]
    data: list[ModelCard]


class _ChatEvent(_Answer):
    request_id: str | None = None
    """Where the request has a `session_id`: by which the answer can be listened to again."""


class PieceEvent(_ChatEvent):
    """Some more of an answer."""

    token: str
    """Its text: perhaps of several tokens, as a character may be."""
    done: Literal[False]


class EndEvent(_ChatEvent):
    """The end of an answer."""

    done: Literal[True]
    full_text: str
    num_tokens: int
    time_to_first_token_ms: float
    """From the request on."""
    tokens_per_second: float
    """From the first token on; 0: there were not two."""
    total_time_ms: float
    """From the request on."""
    finish_reason: Finish


class FailureEvent(_ChatEvent):
    """An answer that could not be finished."""

    error: str
    done: Literal[True]


class ChatEvent(RootModel[PieceEvent | EndEvent | FailureEvent]):
    """An event of `/chat`; over `/ws` each has the request's `id` besides."""


class Cancelled(EndEvent):
    """How an answer ended: its last event."""

    session_id: str


class NotCancelled(FailureEvent):
    """An answer that failed before."""

    session_id: str


class CancelledAnswer(RootModel[Cancelled | NotCancelled]):
    """How an answer ended."""


class SessionSummary(_Answer):
    """A conversation in a list."""

    id: str
    title: str
    """How it begins."""
    updated: float
    """Unix time of its newest message or its end; no two of a list are alike."""
    count: int
    """Messages."""


class SessionList(_Answer):
    """Conversations, newest first."""

    sessions: list[SessionSummary]


class SessionMessage(_Answer):
    """One message of a conversation."""

    number: int
    """Its place, from 1."""
    role: str
    content: str
    created: float
    """Unix time."""
    finish_reason: Literal["stop", "length", "cancelled", "error", "interrupted"] | None
    """Why an answer ended; `interrupted`: the server did. null: it has not, or this is no answer."""
    request_id: str | None
    """Of the request that it answers."""


class Session(_Answer):
    """A conversation."""

    id: str
    messages: list[SessionMessage]
    """Oldest first."""
    running: str | None
    """The request_id of the answer that is under way."""


class SessionDeleted(_Answer):
    """A conversation that has been forgotten."""

    id: str
    deleted: Literal[True]


class ChatCompletionEvent(RootModel[ChatCompletionChunk | ErrorAnswer]):
    """An event of a streamed answer in a conversation, before the text `[DONE]`."""


class CompletionEvent(RootModel[Completion | ErrorAnswer]):
    """An event of a streamed text, before the text `[DONE]`."""


class ServedConfig(_Answer):
    """What is served, and how."""

    model: str
    """Its id."""
    ctx_length: int
    """Most tokens of prompt and answer together."""
    max_new_tokens: int
    """Of an answer where a request says nothing."""
    max_queue: int
    """Requests that may wait."""
    active_decoding_strategy: Strategy
    """How the next token is chosen where a request says nothing."""
    decoding_strategies: DecodingStrategies
    dtype: str
    """Of the weights."""
    mode: Literal["mp", "dp"]
    """mp: the layers are divided over the nodes; dp: each node has all of them."""
    split: list[int] | list[list[int]]
    """Blocks of each stage; with `dp` of each replica."""
    nodes: list[str] | list[list[str]]
    """Their names, alike."""


class Health(_Answer):
    """It answers."""

    status: Literal["ok"]
    running: int
    """Requests that have a slot."""
    waiting: int
    """Requests that wait for one."""


class Unhealthy(_Answer):
    """Nobody computes at the moment."""

    status: Literal["unavailable"]
    reason: str


class Reconnecting(_Answer):
    """The stages are being put together."""

    status: Literal["reconnecting"]
