from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from smolcluster.device import (
    is_out_of_memory,
    prepare_process,
    resolve_device,
)
from smolcluster.errors import ConfigError


def offer(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda:0"), (1, True, "cuda:0")]
)
def test_auto_takes_the_fastest_that_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    offer(monkeypatch, cuda, mps)
    assert str(resolve_device("auto")) == expected
    assert str(resolve_device("cpu")) == "cpu"


def test_ranks_of_one_machine_share_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, cuda=2, mps=False)
    assert [str(resolve_device("cuda", local_rank)) for local_rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, cuda=0, mps=True)
    with pytest.raises(ConfigError, match=r"training.device is 'cuda', but this machine offers mps, cpu"):
        resolve_device("cuda")


def test_a_prepared_process_uses_one_thread_and_flushes_denormals() -> None:
    prepare_process()
    assert torch.get_num_threads() == 1
    assert (torch.tensor([1e-30]) * 1e-10).item() == 0.0


@pytest.mark.parametrize("numbers", [2**62, 2**50])  # more bytes than an int holds; more than an address space
def test_memory_that_cannot_be_had_is_known_from_other_errors(numbers: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(numbers, 7)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps large blocks")
def test_large_tensors_leave_the_process_when_they_are_freed() -> None:
    """In a process of its own: the setting cannot be taken back."""
    program = """
import psutil, torch
from smolcluster.device import give_memory_back
torch.ones(2**22)  # 16 MiB, freed at once: from now on glibc keeps blocks up to that size
assert give_memory_back()
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
held = psutil.Process().memory_info().rss
del blocks[:-1]  # the last one lies above them
assert held - psutil.Process().memory_info().rss > 100 * 2**20
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
