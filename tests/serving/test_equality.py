"""What the engine writes is what transformers' `generate` writes, whatever the split and whatever happens meanwhile."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from serving.cells import CUTS, SLOTS, Cell, Model, check, random_model, rows, run
from smolcluster.models import decoder
from smolcluster.serving import replica, slots

FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "qwen3")
ROWS = rows()
# Every split, and every row; benchmarks/serving_equality.py has all of both.
CELLS = [
    (family, Cell(cuts, *row)) for cuts, row, family in zip(CUTS, itertools.cycle(ROWS), itertools.cycle(FAMILIES))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {family: Model(random_model(tmp_path_factory.mktemp(family), family)) for family in FAMILIES}


def test_every_row_and_every_split_is_among_the_cells() -> None:
    assert {cell.cuts for _, cell in CELLS} == set(CUTS)
    assert len(CUTS) == 42
    assert {(cell.batch, cell.chunk, cell.has_prefix, cell.fails_at) for _, cell in CELLS} == set(ROWS)


@pytest.mark.parametrize(("family", "cell"), CELLS, ids=str)
def test_tokens_and_logits_are_those_of_transformers(models: dict[str, Model], family: str, cell: Cell) -> None:
    check(models[family], cell)


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)], ids=str)
def test_float32_differs_where_two_tokens_are_nearly_equally_likely_only(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    model = Model(random_model(tmp_path, "llama", vocab_size=500, hidden_size=64), dtype=torch.float32)
    found = run(model, Cell(cuts, SLOTS, "small", True, 40))
    different = total = 0
    for number in range(0, SLOTS, 2):  # the greedy ones
        answer = found.tokens[number]
        ours = torch.stack([found.logits[number, at] for at in range(len(answer))])
        theirs = model.logits(number, answer)
        difference = (ours - theirs).abs().amax(dim=1)
        assert difference.max() <= 1e-3
        assert ours.argmax(dim=1).tolist() == answer
        top = theirs.topk(2, dim=1).values
        is_other = theirs.argmax(dim=1) != torch.tensor(answer)
        assert not (is_other & (top[:, 0] - top[:, 1] >= 2 * difference)).any()
        different, total = different + int(is_other.sum()), total + len(answer)
    assert different <= 0.005 * total


@pytest.mark.parametrize("mistake", ["position", "stale slot", "mask", "forgotten failure", "seed"])
def test_broken_engines_are_noticed(models: dict[str, Model], mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["llama"]
    cell = Cell((2, 4), 4, "small", mistake == "stale slot", 40 if mistake == "forgotten failure" else None)
    check(model, cell)
    if mistake == "position":
        plan = replica.plan
        monkeypatch.setattr(
            replica, "plan", lambda *given: [each._replace(start=each.start + 1) for each in plan(*given)]
        )
        monkeypatch.setattr(replica.Replica, "_batch", _batch_one_behind(replica.Replica._batch))
    elif mistake == "stale slot":
        common = slots._common
        monkeypatch.setattr(slots, "_common", lambda kept, tokens: min(common(kept, tokens) + 1, len(tokens) - 1))
    elif mistake == "mask":
        monkeypatch.setattr(decoder, "_mask", lambda *given: None)
    elif mistake == "forgotten failure":
        forget = replica.Stream.forget

        def keep(stream: replica.Stream) -> None:
            computed = stream.computed
            forget(stream)
            stream.computed = max(0, computed - 1)

        monkeypatch.setattr(replica.Stream, "forget", keep)
    else:
        monkeypatch.setattr(replica, "Opened", lambda sampling, context, drawn: _opened(sampling, context, drawn + 1))
    with pytest.raises(AssertionError):
        check(model, cell)


def _opened(*given: object) -> object:
    from smolcluster.serving.executor import Opened

    return Opened(*given)  # type: ignore[arg-type]


def _batch_one_behind(batch: object) -> object:
    def one_behind(self: replica.Replica, segments: list[decoder.Segment]) -> object:
        right = [each._replace(start=each.start - 1) for each in segments]
        made = batch(self, right)  # type: ignore[operator]
        return type(made)(made.number, segments, made.tokens, made.wanted, made.opened)

    return one_behind
