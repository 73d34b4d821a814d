"""A run that goes on keeps its layers where they were, and one rank alone says its hash; in threads of this process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.local import LocalGroup
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.kinds import JsonObject
from smolcluster.run import layers as layers_module
from smolcluster.run.build import prepare
from smolcluster.run.resume import RunMeta, batch_note, find_resume_point, kept_split
from smolcluster.run.session import RankResult, run_rank
from smolcluster.training.role import RunContext

# Models are built under hooks of torch that belong to the whole process; here its threads are ranks.
_BUILDING = threading.Lock()
GPT = (
    *("data.dataset=pydoc", "model.type=gpt", "model.model_dim=16", "model.num_layers=6", "model.num_heads=2"),
    *("model.ff_dim=16", "model.max_seq_len=16", "model.dropout=0", "training.eval_steps=null"),
)


class Rows:
    """A sink that keeps the losses and may ask to stop."""

    def __init__(self, stop: threading.Event, stop_after: int | None) -> None:
        self.losses: dict[int, float] = {}
        self._stop = stop
        self._stop_after = stop_after

    def write(self, row: JsonObject) -> None:
        if "train/loss" in row:
            self.losses[row["step"]] = row["train/loss"]  # type: ignore[index,assignment] # as the trainer writes them
        if row["step"] == self._stop_after:
            self._stop.set()

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        pass


def make_config(*overrides: str, algorithm: str = "mp") -> Config:
    fixed = [f"algorithm={algorithm}", "training.max_steps=12", "training.epochs=null", "training.device=cpu"]
    return load_config(overrides=[*fixed, "training.batch_size=6", "checkpoint.steps=null", *GPT, *overrides]).config


def train(
    config: Config, world_size: int, folder: Path, *, resume: Path | None = None, stop_after: int | None = None
) -> tuple[dict[int, float], RankResult, list[str]]:
    """Rank 0's losses and result, and what it showed the user."""
    told: list[str] = []

    def rank(comm: Communicator) -> tuple[dict[int, float], RankResult]:
        stop = threading.Event()
        rows = Rows(stop, stop_after if comm.rank == 0 else None)
        with _BUILDING:
            parts = prepare(config, comm.rank, [f"rank{number}" for number in range(world_size)])
        leads = comm.rank == 0
        result = run_rank(
            parts,
            comm,
            RunContext(rows, comm, stop),
            checkpoints=folder / "checkpoints" if leads else None,
            resume=resume if leads else None,
            say=told.append if leads else None,
        )
        return rows.losses, result

    losses, result = LocalGroup(world_size).run(rank)[0]
    return losses, result, told


def measures(monkeypatch: pytest.MonkeyPatch, *block_times: float) -> None:
    """What a block takes on each rank from now on; entry and exit take nothing."""

    def measure(*_: Any) -> list[float]:
        rank = int(threading.current_thread().name.rpartition("-")[2])
        return [0.0, *[block_times[rank]] * 6, 0.0]

    monkeypatch.setattr(layers_module, "measure_layers", measure)


def blocks(told: list[str]) -> list[str]:
    """Of each rank, from what was shown."""
    (line,) = [text for text in told if text.startswith("layers: ")]
    return [part.partition("block")[2].partition(" (")[0].removeprefix("s").strip() for part in line.split(";")]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run on two ranks, of which the second one was measured to be half as fast."""
    measures(monkeypatch, 1.0, 2.0)
    _, result, told = train(make_config("cluster.shares=auto"), 2, tmp_path / "cut", stop_after=4)
    assert result.stopped
    assert blocks(told) == ["0 to 3", "4 to 5, exit"]
    return find_resume_point("latest", tmp_path / "cut", {}).checkpoint


def test_a_resumed_run_keeps_its_layers_whatever_is_measured_now(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("cluster.shares=auto")
    whole, result, _ = train(config, 2, tmp_path / "whole")
    measures(monkeypatch, 2.0, 1.0)
    losses, resumed, told = train(config, 2, tmp_path / "cut", resume=interrupted)
    assert blocks(told) == ["0 to 3", "4 to 5, exit"]
    assert losses == {step: loss for step, loss in whole.items() if step >= min(losses)}
    assert resumed.run["weights_sha256"] == result.run["weights_sha256"]
    # And so does the one that goes on from there.
    longer = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 14})})
    point = find_resume_point("latest", tmp_path / "cut", {})
    assert blocks(train(longer, 2, tmp_path / "cut", resume=point.checkpoint)[2]) == ["0 to 3", "4 to 5, exit"]


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (3, ("cluster.shares=auto",), ["0", "1", "2 to 5, exit"]),
        (2, ("cluster.shares=auto", "cluster.layer_distribution=[5, 1]"), ["0 to 4", "5, exit"]),
        (2, ("cluster.shares=[1, 5]",), ["0", "1 to 5, exit"]),
    ],
    ids=["another number of ranks", "a distribution is given", "speeds are given"],
)
def test_what_was_changed_is_decided_anew(
    world_size: int,
    overrides: tuple[str, ...],
    expected: list[str],
    interrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measures(monkeypatch, 3.0, 2.0, 1.0)
    _, result, told = train(make_config(*overrides), world_size, tmp_path / "resumed", resume=interrupted)
    assert result.run["steps"] == 12
    assert blocks(told) == expected


def test_another_number_of_stages_per_rank_is_cut_anew(interrupted: Path, tmp_path: Path) -> None:
    pipeline = ("cluster.shares=auto", "training.schedule=interleaved", "training.micro_batches=2")
    _, result, told = train(
        make_config(*pipeline, algorithm="mp_pipeline"), 2, tmp_path / "resumed", resume=interrupted
    )
    assert result.run["steps"] == 12
    assert blocks(told) != ["0 to 3", "4 to 5, exit"]


def test_a_checkpoint_that_says_nothing_of_layers_is_read_as_before(interrupted: Path) -> None:
    """As those written before this was kept."""
    meta = json.loads((interrupted / "index.json").read_text())["meta"]
    config = make_config("cluster.shares=auto")
    assert kept_split(RunMeta.model_validate(meta), config, 2) == [range(5), range(5, 8)]
    del meta["layer_cuts"]
    assert kept_split(RunMeta.model_validate(meta), config, 2) is None


def test_an_algorithm_that_divides_no_layers_keeps_none(tmp_path: Path) -> None:
    train(make_config(algorithm="classicdp"), 2, tmp_path)
    point = find_resume_point("latest", tmp_path, {})
    assert point.meta.layer_cuts is None


@pytest.mark.parametrize("algorithm", ["mp", "mp_pipeline"])
def test_a_rank_that_is_alone_has_the_whole_model_and_says_its_hash(algorithm: str, tmp_path: Path) -> None:
    _, alone, _ = train(make_config(algorithm=algorithm), 1, tmp_path / "alone")
    assert isinstance(alone.run["weights_sha256"], str)
    assert [report["weights_sha256"] for report in alone.ranks] == [alone.run["weights_sha256"]]
    _, single, _ = train(make_config(algorithm="single"), 1, tmp_path / "single")
    assert alone.run["weights_sha256"] == single.run["weights_sha256"]
    _, divided, _ = train(make_config(algorithm=algorithm), 2, tmp_path / "divided")
    assert isinstance(divided.run["weights_sha256"], str)
    assert [report["weights_sha256"] for report in divided.ranks] == [None, None]


def samples_of_ranks(result: RankResult) -> list[Any]:
    return [report["samples"] for report in result.ranks]


@pytest.mark.parametrize(("delay", "world_size"), [(0, 3), (2, 2)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mp", "mp"),
        ("mp", "classicdp"),
        ("classicdp", "mp"),
        ("classicdp", "classicdp"),
        ("mp_pipeline", "mp_pipeline"),
    ],
)
def test_no_sample_that_a_rank_has_computed_is_lost_or_counted_twice(
    before: str, after: str, delay: int, world_size: int, tmp_path: Path
) -> None:
    """12 steps of 6 samples over all ranks, of which those that wait in the checkpoint are not computed again."""
    late = (f"cluster.staleness_bound={delay}", "training.micro_batches=2")
    _, cut, _ = train(
        make_config(*late, f"training.batch_size={3 if before == 'classicdp' else 6}", algorithm=before),
        2,
        tmp_path,
        stop_after=4,
    )
    assert cut.stopped
    point = find_resume_point("latest", tmp_path, {})
    assert point.meta.progress.samples == 6 * point.step
    assert point.meta.progress.computed == point.step + delay
    config = make_config(*late, algorithm=after)
    _, result, _ = train(config, world_size, tmp_path, resume=point.checkpoint)
    assert result.run["samples"] == 72
    computed = samples_of_ranks(result)
    if after == "classicdp":
        assert sum(computed) == 72
        if before != "classicdp":  # rank 0 has inherited all of them, the others none
            of_others = (12 - point.step - delay) * 6 // world_size
            assert computed[1:] == [of_others] * (world_size - 1)
    else:
        assert computed == [72] * world_size


def test_where_layers_are_divided_nothing_is_dealt(interrupted: Path) -> None:
    point = find_resume_point(str(interrupted), None, {})
    kept = "training.batch_size 8 is ignored: the run's global batch of 6 samples is kept"
    for algorithm in ("mp", "mp_pipeline"):
        note = batch_note(point, make_config(algorithm=algorithm), 8, 3)
        assert note == f"{kept}; the layers are cut over 3 ranks, and every rank computes all samples"
        assert batch_note(point, make_config(algorithm=algorithm), 6, 3) is None
    assert batch_note(point, make_config(algorithm="classicdp"), 8, 3) == f"{kept} and dealt anew to 3 ranks"
