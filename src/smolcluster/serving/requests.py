"""What is asked of a model, what comes back piece by piece, and what is known of an answer in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from smolcluster.errors import ServingError
from smolcluster.serving.sampling import Sampled, Sampling
from smolcluster.serving.text import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(ServingError):
    """As many requests wait as may wait."""


class Unavailable(ServingError):
    """Nobody computes at the moment, or no more."""


class ContextOverflow(ServingError):
    """Prompt and answer have no room in the model's context."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks for.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: of the answer.
        sampling: how its tokens are chosen.
        stop_tokens: ids that end the answer, and are no part of it.
        stops: strings that do.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    stops: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Some more of an answer.

    Attributes:
        text: what follows, perhaps nothing yet.
        token: the newest one; None: only the text is new.
        finish_reason: why the answer ends here; None: it goes on.
        error: what went wrong, if that is why.
    """

    text: str
    token: Sampled | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """An answer under way. Whoever has it, the queue or a replica, changes it.

    Attributes:
        number: counts up.
        request: what was asked.
        on_event: is told every piece.
        text: of the answer.
        tokens: prompt and answer so far.
        submitted, queued, newest: `time.monotonic()` of the request, of when it began to wait for a slot, and of its
            newest token (0: none).
        slot: where its keys and values are.
        computed: how many of its tokens the stages have computed, or are computing.
        is_busy: a token of it is on its way.
        is_opened: the last stage knows how its tokens are chosen.
        is_cancelled: nobody wants the rest.
        recoveries: how often its stages have failed since its newest token.
    """

    number: int
    request: Request
    on_event: Callable[[Event], None]
    text: TextStream
    tokens: list[int]
    submitted: float = field(default_factory=time.monotonic)
    queued: float = field(default_factory=time.monotonic)
    newest: float = 0.0
    slot: int = -1
    computed: int = 0
    is_busy: bool = False
    is_opened: bool = False
    is_cancelled: bool = False
    recoveries: int = 0

    @property
    def answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    def forget(self) -> None:
        """Its keys and values are lost; its tokens are not."""
        self.computed, self.is_busy, self.is_opened = 0, False, False
        self.recoveries += 1
