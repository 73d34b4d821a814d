"""The run folder: what is in it after a run, after a broken one, and while threads still write."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from smolcluster.config.load import load_config
from smolcluster.errors import ConfigError
from smolcluster.monitoring.reporters import LineReporter
from smolcluster.run.folder import RunFolder, default_out, loss_unit, rate_unit

CONFIG = load_config("classicdp_digits").config


def make_folder(path: Path, world_size: int = 2) -> tuple[RunFolder, io.StringIO]:
    shown = io.StringIO()
    return RunFolder(path, CONFIG, world_size, LineReporter(shown, 10)), shown


def row(rank: int, step: int, **more: float) -> dict[str, Any]:
    return {"time": 1.0, "rank": rank, "step": step, "train/loss": 2.0, "train/samples": 8, **more}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_finished_run_has_configuration_rows_summary_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = make_folder(tmp_path / "run")
    with folder:
        for step in range(3):
            folder.write(row(0, step))
            folder.write(row(1, step))
        folder.finish({"steps": 3, "weights_sha256": "ab"}, [{"samples": 12}, {"samples": 12}])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    summary = read(tmp_path / "run" / "summary.json")
    assert (summary["algorithm"], summary["model"], summary["world_size"]) == ("classicdp", "simple_nn", 2)
    assert summary["rank_samples"] == [12, 12]
    assert (tmp_path / "run" / "loss.png").exists()
    # and config.yaml alone repeats the run
    again = load_config(files=[tmp_path / "run" / "config.yaml"]).config
    assert again == CONFIG
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"] == "classicdp"


def test_a_broken_run_keeps_what_is_known_from_its_rows(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path / "run")
    with folder:
        folder.write(row(0, 0, **{"val/loss": 1.5}))
        folder.write(row(1, 0))
        folder.write(row(0, 1, **{"train/loss": 1.25}))
        folder.fail([1])
    summary = read(tmp_path / "run" / "summary.json")
    assert (summary["steps"], summary["samples"]) == (2, 16)
    assert (summary["train_loss"], summary["val_loss"]) == (1.25, 1.5)
    assert summary["lost_ranks"] == [1]
    assert summary["weights_sha256"] is None
    assert summary["rank_weights_sha256"] == [None, None]
    assert not (tmp_path / "run" / "loss.png").exists()  # there is no time for it


def test_a_run_that_breaks_off_before_it_goes_on_keeps_its_summary(tmp_path: Path) -> None:
    def resumed() -> RunFolder:
        return RunFolder(tmp_path, CONFIG, 2, LineReporter(io.StringIO(), 10), 2)

    folder, _ = make_folder(tmp_path)
    with folder:
        for step in range(2):
            folder.write(row(0, step))
        folder.finish({"steps": 2, "weights_sha256": "ab"}, [None, None])
    with resumed() as folder:
        folder.fail()
    assert read(tmp_path / "summary.json")["weights_sha256"] == "ab"
    with resumed() as folder:
        folder.write(row(0, 2))
        folder.fail()
    summary = read(tmp_path / "summary.json")
    assert (summary["steps"], summary["weights_sha256"]) == (3, None)


def test_a_row_that_comes_after_the_end_is_dropped(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path / "run")
    with folder:
        folder.write(row(0, 0))
    folder.write(row(1, 0))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"the run folder .*run cannot be made"):
        make_folder(tmp_path / "run")


def test_two_runs_in_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20260102-030405")
    first = default_out(CONFIG)
    assert first == Path("runs", "classicdp-simple_nn-20260102-030405")
    first.mkdir(parents=True)
    assert default_out(CONFIG) == Path("runs", "classicdp-simple_nn-20260102-030405-2")


def test_units_follow_the_data() -> None:
    text = load_config("classicdp_gpt").config
    assert (loss_unit(text), rate_unit(text)) == ("nats per byte", "tokens")
    assert (loss_unit(CONFIG), rate_unit(CONFIG)) == ("nats", "samples")
    for config, units in ((text, ("nats per byte", "tokens")), (CONFIG, ("nats", "samples"))):
        own_model = config.model_copy(update={"model": config.model.model_copy(update={"type": "mine:Net"})})
        assert (loss_unit(own_model), rate_unit(own_model)) == units
