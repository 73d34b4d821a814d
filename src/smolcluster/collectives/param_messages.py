"""What a worker and a parameter server say of a push; see param_server.py."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PushNote(BaseModel):
    """What a worker says of a push; its gradient follows.

    Attributes:
        leases: whose samples it is of, in the order in which they were computed.
        bases: for each of them the version of the weights that it was computed on.
        loss_sum: over all targets; null if it is not finite.
        count: targets.
        samples: samples.
        scale: what each summed loss was multiplied with before backward.
        compute_s: seconds that computing took.
        missing: numbers of the parameters that had no gradient; zeros stand for theirs.
        pull: the worker wants weights once this is applied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    leases: tuple[int, ...] = Field(min_length=1)
    bases: tuple[int, ...]
    loss_sum: float | None
    count: int = Field(ge=0)
    samples: int = Field(ge=0)
    scale: float = Field(gt=0)
    compute_s: float = Field(ge=0)
    missing: tuple[int, ...] = ()
    pull: bool = False


class Answer(BaseModel):
    """What became of a push.

    Attributes:
        status: `applied`; `refused`: it came too late and its samples were given to others; `lost`: nobody knows,
            since the connection broke.
        step: that it counted for; of a refused one the step that was closed.
        loss: mean loss of that step over all workers; null if it is not finite.
        count: targets of the step.
        samples: samples of the step.
        grad_norm: of the step's gradient; null if it is not finite.
        lr: learning rate that the update used.
        is_skipped: the gradient was not finite, and the update was passed over.
        version: of the server's weights after it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: str
    step: int = 0
    loss: float | None = None
    count: int = 0
    samples: int = 0
    grad_norm: float | None = None
    lr: float = 0.0
    is_skipped: bool = False
    version: int = 0
