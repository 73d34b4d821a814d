"""The loss picture: what is drawn, and what is said when it cannot be."""

import sys
from array import array
from pathlib import Path

import pytest

from smolcluster.monitoring.curves import LossCurves, draw_losses, smoothed


def make_curves(steps: int) -> LossCurves:
    curves = LossCurves()
    for step in range(steps):
        curves.add({"rank": 0, "step": step, "train/loss": 3.0 / (step + 1)})
        curves.add({"rank": 1, "step": step, "train/loss": 99.0})
    curves.add({"rank": 0, "step": steps - 1, "val/loss": 0.5})
    return curves


def test_only_rank_0_is_kept_as_the_others_repeat_it() -> None:
    curves = make_curves(4)
    assert list(curves.steps) == [0, 1, 2, 3]
    assert max(curves.losses) == 3.0
    assert (list(curves.val_steps), list(curves.val_losses)) == ([3], [0.5])


def test_a_step_without_a_finite_loss_leaves_no_point() -> None:
    curves = LossCurves()
    curves.add({"rank": 0, "step": 0, "train/loss": None})
    assert list(curves.steps) == []


def test_smoothing_starts_at_the_first_value_and_follows_the_level() -> None:
    values = smoothed(array("d", [2.0] * 50 + [1.0] * 500), 10)
    assert values[0] == pytest.approx(2.0)
    assert values[49] == pytest.approx(2.0)
    assert 1.0 < values[60] < 2.0
    assert values[-1] == pytest.approx(1.0, abs=1e-9)


def test_the_picture_is_a_png_of_some_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    assert draw_losses(make_curves(200), path, "classicdp, gpt, 3 ranks", "nats per byte") is None
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_without_matplotlib_the_note_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    note = draw_losses(make_curves(3), tmp_path / "loss.png", "title")
    assert note is not None
    assert 'pip install "smolcluster[plot]"' in note
    assert not (tmp_path / "loss.png").exists()


def test_a_run_without_a_step_has_no_picture(tmp_path: Path) -> None:
    assert draw_losses(LossCurves(), tmp_path / "loss.png", "title") == "no loss.png: no step was finished"
