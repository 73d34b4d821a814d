"""One served model: what the interfaces ask of it, whatever they look like."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from smolcluster.config.schema import ServingConfig
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import ServingError
from smolcluster.kinds import JsonObject
from smolcluster.serving.chat_template import ChatTemplate, Message
from smolcluster.serving.engine import Engine
from smolcluster.serving.requests import ContextOverflow, Event, Request
from smolcluster.serving.sampling import Sampling

Strategy = Literal["greedy", "sampling", "top_p", "top_k"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says about its answer; None: nothing.

    Attributes:
        strategy: one of `serving.decoding_strategies`.
        temperature, top_p, top_k, min_p, repetition_penalty, seed, logprobs: see sampling.Sampling.
        max_tokens: of the answer.
        stops: strings that end it.
    """

    strategy: Strategy | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()


class Service:
    """A model, its tokenizer and how it is asked. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        settings: ServingConfig,
        *,
        vocab_size: int,
        model: str,
        stop_tokens: frozenset[int],
        describe: Callable[[], JsonObject],
        close: Callable[[], object],
    ) -> None:
        """Args:
        engine: computes.
        tokenizer: the model's.
        template: the model's.
        settings: what applies where a request says nothing.
        vocab_size: of the model; its tokenizer may know more ids.
        model: the id that requests name it by.
        stop_tokens: that end an answer.
        describe: how it is served.
        close: ends all that computes.
        """
        self.describe = describe
        self.close = close
        self.engine = engine
        self.settings = settings
        self.model = model
        self.started = int(time.time())
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._template = template
        self._stop_tokens = stop_tokens

    def encode(self, text: str, *, is_whole: bool = False) -> list[int]:
        """Ids of a prompt; `is_whole`: the special tokens that belong around it are in it.

        Raises:
            ServingError: there are none, or it is not a text that UTF-8 can say.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # JSON can: "\ud800"
            raise ServingError("the prompt has half of a surrogate pair, which is no character. Leave it out") from exc
        encode = self._tokenizer.encode_whole if is_whole else self._tokenizer.encode
        ids: list[int] = encode(text).tolist()
        if not ids:
            raise ServingError("the prompt is empty. Give at least one character")
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(torch.tensor(tokens, dtype=torch.int64))

    def token_text(self, token: int) -> str:
        """What a token adds to a text; by itself it might lose a space before it."""
        return self.decode([token, token])[len(self.decode([token])) :]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the answer begins."""
        text = self._template(messages)
        # A model's own template writes down what its tokenizer would put around a text.
        return self.encode(text, is_whole=self._template.is_own)

    def request(self, prompt: Sequence[int], wishes: Wishes) -> Request:
        """What the engine is asked.

        Raises:
            ContextOverflow: the prompt leaves no room for an answer.
            ServingError: it has a token that the model does not.
        """
        if (largest := max(prompt)) >= self.vocab_size:
            raise ServingError(f"the prompt has token {largest}, but the model's are 0 to {self.vocab_size - 1}")
        room = self.engine.length - len(prompt)
        if room < 1:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens, but the context has {self.engine.length} in all. Shorten it"
            )
        limit = wishes.max_tokens or min(self.settings.max_new_tokens, room)
        return Request(prompt, limit, self.sampling(wishes), self._stop_tokens, wishes.stops)

    def sampling(self, wishes: Wishes) -> Sampling:
        """How tokens are chosen: the strategy, the request's or the active one, and what the request says besides."""
        name = wishes.strategy or self.settings.active_decoding_strategy
        if wishes.strategy is None and name == "greedy" and wishes.temperature:
            name = "sampling"
        chosen = self.settings.decoding_strategies
        base = {
            "greedy": Sampling(temperature=0.0),
            "sampling": Sampling(temperature=chosen.sampling.temperature),
            "top_p": Sampling(temperature=chosen.top_p.temperature, top_p=chosen.top_p.p),
            "top_k": Sampling(temperature=chosen.top_k.temperature, top_k=chosen.top_k.k),
        }[name]
        seed = secrets.randbits(31) if wishes.seed is None else wishes.seed
        given = {
            key: value
            for key in ("top_p", "top_k", "min_p", "repetition_penalty", "logprobs")
            if (value := getattr(wishes, key)) is not None
        }
        if wishes.temperature is not None and name != "greedy":
            given["temperature"] = wishes.temperature
        return replace(base, seed=seed, **given)

    def ask(self, request: Request) -> Answer:
        """Begin an answer.

        Raises:
            ContextOverflow: there is no room for it.
            QueueFull: too many wait.
        """
        return Answer(self.engine, request)


class Answer:
    """An answer under way: its events, in an asyncio loop. `cancel` it if nobody wants the rest.

    Attributes:
        first_at, newest_at: `time.perf_counter()` when the engine had its first and newest token; 0: it had none.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.first_at = self.newest_at = 0.0
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[Event]()
        self._number = engine.submit(request, self._pass_on)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Every event, to the last one."""
        while True:
            await asyncio.sleep(0)  # where events have piled up: others have their turn, and a client may be gone
            event = await self._events.get()
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Let the stages stop; an answer that has ended stays as it is."""
        self._engine.cancel(self._number)

    def _pass_on(self, event: Event) -> None:
        """In the engine's thread."""
        if event.token is not None:
            self.newest_at = time.perf_counter()
            self.first_at = self.first_at or self.newest_at
        with contextlib.suppress(RuntimeError):  # the loop has ended before the engine
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
