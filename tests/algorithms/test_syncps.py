"""syncps: strict, it equals `single`; with a time limit, who is late is refused and nothing is lost."""

from __future__ import annotations

import pytest

from algorithms.equality import Case, run_single
from algorithms.param_servers import ParamServerRun, Setting, check_against


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("staleness_bound", [0, 1, 3])
def test_strict_equals_single_with_the_same_k(workers: int, staleness_bound: int) -> None:
    case = Case(options={"staleness_bound": staleness_bound, "grad_clip_norm": 0.5})
    run = ParamServerRun(case, Setting(workers)).start()
    result = run.result()
    assert not run.worker_errors
    assert result.steps == case.steps
    check_against(run_single(case), run, 1e-11)
