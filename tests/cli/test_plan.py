"""`smolcluster plan pipeline`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smolcluster
from docs import pages
from smolcluster import cli
from smolcluster.cli.plan import table_lines
from smolcluster.training.pipeline_schedule import make_schedule, timeline

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--stages", "3", "--micro-batches", "4")


def plan(*arguments: str) -> int:
    return cli._run(["plan", "pipeline", *arguments], "smolcluster")


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_prints_table_bubble_and_memory_and_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*SMALL, "--schedule", "1f1b") == 0
    assert capsys.readouterr() == (
        """\
1f1b: 3 ranks, 4 micro-batches
F0: forward of micro-batch 0, 1 tick; B0: its backward, 2 ticks; a dot: waiting

tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
rank 0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
rank 1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
rank 2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .

bubble: 33.3% of the ranks' time is waiting; the least there can be is 2/(4+2) = 33.3%
memory: at most so many micro-batches wait for their backward, each with all activations of a stage:
  rank 0: 3, rank 1: 2, rank 2: 1
picture: pipeline-1f1b-3-4.png
""",
        "",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline-1f1b-3-4.png"]
    assert (tmp_path / "pipeline-1f1b-3-4.png").read_bytes().startswith(PNG)


def test_an_interleaved_table_names_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--stages", "2", "--micro-batches", "2", "--schedule", "interleaved", "--per-rank", "2") == 0
    out = capsys.readouterr().out
    assert "@2: in stage 2, of rank 0" in out
    assert "rank 0  F0@0 F1@0 F0@2 F1@2 .    .    B0@2----- .    B1@2----- B0@0----- B1@0-----" in out
    assert "1/(2*2+1) = 20.0%" in out
    assert "a stage is 1/2 of a rank's layers here" in out


def test_interleaved_with_too_few_micro_batches_says_why_it_waits_longer(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--stages", "4", "--micro-batches", "2", "--schedule", "interleaved") == 0
    assert "at least as many micro-batches as ranks, 4" in capsys.readouterr().out


def test_a_long_table_is_cut_in_parts_that_fit_on_a_screen() -> None:
    for name, ranks, count in (("gpipe", 8, 32), ("1f1b", 12, 40), ("interleaved", 8, 32)):
        schedule = make_schedule(name, ranks, count)  # type: ignore[arg-type]
        lines = table_lines(schedule, timeline(schedule))
        assert max(map(len, lines)) <= 100
        assert lines.count("") > 0
        ticks = [int(tick) for line in lines if line.startswith("tick") for tick in line.split()[1:]]
        assert ticks == list(range(round(timeline(schedule).duration)))
        row = "".join(line.removeprefix("rank 0") for line in lines if line.startswith("rank 0 "))
        assert row.count("F") == row.count("B") == count * schedule.stages_per_rank


def test_a_backward_may_take_as_long_as_a_forward(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--stages", "2", "--micro-batches", "2", "--schedule", "gpipe", "--backward", "1") == 0
    assert "rank 0  F0 F1 .  .  B0 B1\nrank 1  .  F0 F1 B0 B1 .\n" in (
        "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    )


def test_json_has_the_whole_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*SMALL, "--schedule", "gpipe", "--json", "--out", "plan.svg") == 0
    found = json.loads(capsys.readouterr().out)
    ranks = found.pop("ranks")
    assert found == {
        "schedule": "gpipe", "stages": 3, "per_rank": 1, "micro_batches": 4, "backward": 2, "ticks": 18,
        "bubble": pytest.approx(1 / 3), "ideal_bubble": pytest.approx(1 / 3), "picture": "plan.svg",
    }  # fmt: skip
    assert [rank["held"] for rank in ranks] == [4, 4, 4]
    assert ranks[2]["actions"][0] == {"direction": "F", "stage": 2, "micro": 0, "start": 2, "end": 3}
    assert all(len(rank["actions"]) == 8 for rank in ranks)
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


def test_without_matplotlib_there_is_a_table_and_a_word_about_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plan(*SMALL) == 0
    out = capsys.readouterr().out
    assert "rank 2  .  .  F0 B0---" in out
    assert out.endswith('no picture: it needs matplotlib. Install it: pip install "smolcluster[plot]"\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0", "--micro-batches", "4"], "--stages 0: give a whole number of 1 or more"),
        (["--stages", "3", "--micro-batches", "-1"], "--micro-batches -1: give"),
        ([*SMALL, "--backward", "0"], "--backward 0: give"),
        ([*SMALL, "--schedule", "interleaved", "--per-rank", "0"], "--per-rank 0: give"),
        (
            [*SMALL, "--schedule", "gpipe", "--per-rank", "7"],
            "--schedule gpipe each rank has one stage. Give --schedule interl",
        ),
        ([*SMALL, "--per-rank", "2"], "--per-rank 2: with --schedule 1f1b each rank has one stage"),
        ([*SMALL, "--schedule", "gpipe", "--per-rank", "0"], "--per-rank 0: give"),
        (["--stages", "9", "--micro-batches", "50000", "--json"], "a table of 1350216 cells is more than is worth"),
        ([*SMALL, "--schedule", "zigzag"], "schedule zigzag is unknown. Use one of gpipe, 1f1b, interleaved"),
        (["--stages", "2000", "--micro-batches", "1"], "a table of"),
        (["--stages", "9", "--micro-batches", "5000"], "a table of 135216 cells is more than anybody reads"),
        ([*SMALL, "--out", "nowhere/plan.png"], "--out nowhere/plan.png: there is no folder nowhere"),
        ([*SMALL, "--out", "plan.docx"], "has to end in one of .png, .svg, .pdf"),
        (["--stages", "3"], "--micro-batches"),
    ],
)
def test_what_a_user_can_mend_exits_2_on_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--out", "plan.png")])
def test_a_picture_that_cannot_be_written_exits_2_after_the_table(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = arguments[-1] if arguments else "pipeline-1f1b-3-4.png"
    (tmp_path / name).mkdir()  # as good as a folder without the right to write, which root has everywhere
    assert plan(*SMALL, *arguments) == 2
    out, err = capsys.readouterr()
    assert "rank 2  .  .  F0 B0---" in out
    assert out.endswith("  rank 0: 3, rank 1: 2, rank 2: 1\n")
    assert len(err.splitlines()) == 1
    assert f"{name} cannot be written" in err
    assert "Choose another --out" in err


def test_json_is_whole_also_where_the_picture_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline-1f1b-3-4.png").mkdir()
    assert plan(*SMALL, "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["picture"] is None
    assert len(json.loads(out)["ranks"]) == 3
    assert len(err.splitlines()) == 1


def test_json_may_be_longer_than_anybody_reads_but_is_not_drawn_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--stages", "8", "--micro-batches", "1000")
    assert plan(*size) == 2
    assert "a table of 24168 cells is more than anybody reads (20000)" in capsys.readouterr().err
    assert plan(*size, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["ranks"][7]["actions"]), found["picture"]) == (2000, None)
    assert list(tmp_path.iterdir()) == []


def test_one_stage_per_rank_is_what_other_schedules_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*SMALL, "--schedule", "gpipe", "--per-rank", "1") == 0
    assert capsys.readouterr().out.startswith("gpipe: 3 ranks, 4 micro-batches\n")


def test_it_does_not_import_torch() -> None:
    script = (
        "import sys; from smolcluster.cli import _run; "
        "code = _run(['plan', 'pipeline', '--stages', '2', '--micro-batches', '2'], 'smolcluster'); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(smolcluster.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_page_on_pipelines_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [s for s in pages.sessions(pages.ROOT / "docs" / "pipeline.md") if s.command[1] == "plan"]
    assert len(shown) == 2
    for session in shown:
        assert cli._run(session.command[1:], "smolcluster") == 0
        assert capsys.readouterr().out == session.output
