"""What a process uses of its machine; the GPU is a fake one."""

import pytest
import torch

from smolcluster.monitoring.resources import ProcessUsage, peak_rss_bytes


def test_a_process_on_the_cpu_has_no_gpu_columns() -> None:
    row = ProcessUsage(torch.device("cpu")).row()
    assert row.keys() == {"sys/cpu_percent", "sys/rss_bytes"}
    assert row.keys() == ProcessUsage().row().keys()
    # torch alone takes more than 50 MB; resident memory does not exceed its own peak, but for what it grew by since
    assert 50e6 < row["sys/rss_bytes"] < 1.1 * peak_rss_bytes()  # type: ignore[operator]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = torch.device("cuda", 1)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda where: 4096 if where == device else 0)
    monkeypatch.setattr("torch.cuda.utilization", lambda where: 93 if where == device else 0)
    return device


def test_a_gpu_tells_memory_and_how_busy_it_is(fake_cuda: torch.device) -> None:
    row = ProcessUsage(fake_cuda).row()
    assert (row["sys/gpu_memory_bytes"], row["sys/gpu_percent"]) == (4096, 93)


def test_a_driver_that_does_not_tell_is_asked_once(fake_cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def refuse(where: torch.device) -> int:
        asked.append(where)
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr("torch.cuda.utilization", refuse)
    usage = ProcessUsage(fake_cuda)
    for _ in range(2):
        row = usage.row()
        assert row["sys/gpu_memory_bytes"] == 4096
        assert "sys/gpu_percent" not in row
    assert asked == [fake_cuda]


def test_apples_gpu_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.mps.current_allocated_memory", lambda: 8192)
    row = ProcessUsage(torch.device("mps")).row()
    assert row["sys/gpu_memory_bytes"] == 8192
    assert "sys/gpu_percent" not in row
