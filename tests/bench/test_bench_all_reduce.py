"""`smolcluster bench all-reduce`: its options, its check of every sum, and one real measurement."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from smolcluster import cli
from smolcluster.bench.all_reduce import _Block, parse_sizes
from smolcluster.errors import ClusterError, ConfigError


def test_sizes_are_read_with_their_units() -> None:
    assert parse_sizes("4KiB, 1MiB,7,2GiB,10B") == [4096, 1 << 20, 7, 2 << 30, 10]


@pytest.mark.parametrize("text", ["", "4KB", "-1", "0", "5GiB", "four"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("--against", "mpi", "Use gloo"),
        ("--compression", "zip", "none or bf16"),
        ("--dtype", "int32", "float32"),
        ("--link", "usb", "tcp or shm"),
        ("--congestion", "fair", "equal or default"),
        ("--world", "1", "from 2 to 64"),
        ("--sizes", "big", "4KiB"),
    ],
)
def test_wrong_options_are_refused_with_what_there_is(
    option: str, value: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["bench", "all-reduce", option, value], "smolcluster") == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [lambda tensor: None, lambda tensor: tensor.mul_(2), lambda tensor: tensor[7].add_(1)]
)
def test_a_wrong_sum_ends_the_measurement(wrong: object) -> None:
    block = _Block(torch.zeros(1000), 0, 3, sync=lambda: None)
    with pytest.raises(ClusterError, match="wrong sum after 4 calls"):
        block.seconds(wrong, [4])  # type: ignore[arg-type] # one of three callables


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_rounding_hides_no_wrong_sum(codec: str, world_size: int) -> None:
    for rank in range(world_size):
        block = _Block(torch.zeros(1000), rank, world_size, codec=codec, sync=lambda: None)
        for calls in (1, max(block.fitting_calls(1e-5))):
            for wrong in (lambda tensor: None, lambda tensor: tensor.zero_()):
                with pytest.raises(ClusterError, match="wrong sum"):
                    block.seconds(wrong, [calls])


def test_a_right_sum_passes_after_many_calls() -> None:
    block = _Block(torch.zeros(1000), 0, 3, sync=lambda: None)
    is_first = [True]

    def sum_of_three(tensor: Tensor) -> None:  # ranks 0, 1 and 2 begin with 1, 2 and 3 times the pattern
        tensor.mul_(6 if is_first[0] else 3)
        is_first[0] = False

    assert block.seconds(sum_of_three, [50]) > 0


def test_a_block_is_filled_again_before_its_values_grow_too_large() -> None:
    block = _Block(torch.zeros(1000), 0, 4, sync=lambda: None)
    short, long = block.fitting_calls(1e-4), block.fitting_calls(1e-2)
    assert len(short) > 1
    assert max(short) <= 51  # of four ranks every call but the first takes two bits of the exponent
    assert sum(long) == 10
    assert block.fitting_calls(1.0) == [1]


def test_each_filling_forgets_what_the_one_before_has_lost() -> None:
    """A residual of values that have grown, added to those that begin anew: with 8 ranks the sum would be wrong."""
    refilled = []
    block = _Block(torch.zeros(1000), 0, 2, codec="int8", refilled=lambda: refilled.append(1), sync=lambda: None)
    is_first = iter([True, False] * 3)
    block.seconds(lambda tensor: tensor.mul_(3 if next(is_first) else 2), [2, 2, 2])
    assert len(refilled) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--compression", "int8"], ["--compression", "fp16"], ["--compression", "bf16"], ["--dtype", "float16"]],
    ids=lambda options: options[-1],
)
def test_rounding_alone_fails_no_measurement(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "all-reduce", "--world", "2", "--sizes", "4KiB,1MiB", "--runs", "3", "--json", *options]
    assert cli._run(command, "smolcluster") == 0, capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_against_gloo_print_what_the_contract_says(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "all-reduce",
        "--world",
        "2",
        "--sizes",
        "4KiB,1MiB",
        "--against",
        "gloo",
        "--runs",
        "2",
        "--json",
    ]
    assert cli._run(command, "smolcluster") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["bytes"], row["world"]) for row in rows] == [(4096, 2), (1 << 20, 2)]
    for row in rows:
        assert row["tcp_ms"] > 0
        assert row["ratio"] == pytest.approx(row["gloo_ms"] / row["tcp_ms"])
