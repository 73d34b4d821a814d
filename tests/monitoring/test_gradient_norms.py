"""`grad_norm/<parameter>`: against a plain loop, with clipping, late gradients, tied weights and skipped updates."""

import math
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.kinds import JsonObject
from smolcluster.monitoring.gradients import GradientNorms
from smolcluster.training.strategy import Strategy
from smolcluster.training.trainer import Trainer

STEPS, BATCH, CLASSES, CLIP, LR = 7, 8, 5, 0.3, 0.5
BUILDING = threading.Lock()  # ranks are threads, and share torch's random numbers


class Tied(nn.Module):
    """Its last layer is its first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(CLASSES, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embed(inputs))))


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        pair = torch.randint(0, CLASSES, (2, BATCH), generator=generator)
        yield pair[0], pair[1]


def expected(staleness_bound: int) -> list[dict[str, float]]:
    """Each update's norms before clipping, from a loop of plain PyTorch."""
    model = Tied().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    waiting: deque[list[torch.Tensor]] = deque()
    norms = []

    def apply() -> None:
        for param, grad in zip(model.parameters(), waiting.popleft(), strict=True):
            param.grad = grad
        norms.append({name: float(param.grad.norm()) for name, param in model.named_parameters()})
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    for inputs, targets in batches():
        loss = F.cross_entropy(model(inputs), targets)
        waiting.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        if len(waiting) > staleness_bound:
            apply()
    while waiting:
        apply()
    return norms


class Rows:
    """A sink that does what a rank's sink does with the norms."""

    def __init__(self, norms: GradientNorms) -> None:
        self.norms = norms
        self.rows: list[dict[str, Any]] = []

    def write(self, row: JsonObject) -> None:
        self.rows.append(row | self.norms.row(row))

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        pass


def run(comm: LocalCommunicator | None, staleness_bound: int, **more: Any) -> list[dict[str, Any]]:
    """The rows of a run with `Single` (without ranks), or of one rank of `ClassicDP`."""
    with BUILDING:
        model = Tied()
    made: list[torch.optim.Optimizer] = []

    def factory(params: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(params, lr=LR))
        return made[-1]

    options = {"staleness_bound": staleness_bound, "grad_clip_norm": CLIP, "precision": "fp64", **more}
    strategy: Strategy = (
        Single(model, factory, **options) if comm is None else ClassicDP(model, factory, comm, **options)
    )
    share = slice(0, BATCH) if comm is None else slice(comm.rank, BATCH, comm.world_size)
    mine = [[Batch(inputs[share], targets[share], BATCH)] for inputs, targets in batches()]
    rows = Rows(GradientNorms(strategy.model, made[0]))
    Trainer(strategy, mine, STEPS).run(rows, comm)
    return rows.rows


def norms_of(row: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("grad_norm/"): value for key, value in row.items() if key.startswith("grad_norm/")}


@pytest.mark.parametrize("staleness_bound", [0, 2])
@pytest.mark.parametrize("world_size", [0, 2])
def test_norms_are_those_of_a_plain_loop(staleness_bound: int, world_size: int) -> None:
    if world_size:
        all_rows = LocalGroup(world_size).run(lambda comm: run(comm, staleness_bound))
    else:
        all_rows = [run(None, staleness_bound)]
    reference = expected(staleness_bound)
    assert all(math.hypot(*norms.values()) > CLIP for norms in reference)  # so that clipping has something to do
    for rows in all_rows:
        assert len(rows) == STEPS
        for row, norms in zip(rows, reference, strict=True):
            assert norms_of(row).keys() == norms.keys() == {"embed.weight", "middle.weight", "middle.bias"}
            # float64: sums in another order differ by some 1e-16
            assert norms_of(row) == pytest.approx(norms, rel=1e-10)
            assert row["train/grad_norm"] == pytest.approx(math.hypot(*norms_of(row).values()), rel=1e-10)


def test_an_update_that_is_skipped_has_no_norms_and_shifts_no_others() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = GradientNorms(model, optimizer)

    def step(gradient: float) -> None:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()

    step(3.0)
    step(0.0)  # a step without a gradient is applied, and told with norm 0
    step(1.0)
    true_norm = math.hypot(3.0, 3.0)
    assert norms.row({"train/loss": None, "train/grad_norm": 1.0}) == {}
    assert norms.row({"train/loss": 1.0, "train/grad_norm": None}) == {}
    assert norms.row({"train/loss": 1.0, "train/grad_norm": 2 * true_norm}) == {"grad_norm/weight": 2 * true_norm}
    assert norms.row({"train/loss": 1.0, "train/grad_norm": 0.0}) == {}
    assert norms.row({"train/loss": 1.0, "train/grad_norm": 1.0}) == {"grad_norm/weight": pytest.approx(1.0)}
    assert norms.row({"train/loss": 1.0, "train/grad_norm": 1.0}) == {}


def test_half_precision_gradients_do_not_overflow() -> None:
    model = nn.Linear(256, 256, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = GradientNorms(model, optimizer)
    model.weight.grad = torch.full_like(model.weight, 1000.0)  # its norm is 256 000, above float16's largest number
    optimizer.step()
    assert norms.row({"train/loss": 1.0, "train/grad_norm": 256000.0}) == {"grad_norm/weight": pytest.approx(256000.0)}
