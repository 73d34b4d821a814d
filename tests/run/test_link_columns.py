"""The link columns of a run, in threads of this process: when they are due, and that they can be switched off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from collectives.contract import run_group
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.kinds import JsonObject
from smolcluster.run.build import prepare
from smolcluster.run.connect import join_tcp
from smolcluster.run.session import run_rank
from smolcluster.run.support import tcp_options
from smolcluster.training.role import RunContext
from smolcluster.transport.tcp import TcpOptions, listen
from transport.leaks import no_leftovers

MIB = 1 << 20


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    with no_leftovers():
        yield


class Rows:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: JsonObject) -> None:
        self.rows.append(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        pass


def make_config(*overrides: str) -> Config:
    fixed = ["training.max_steps=6", "training.device=cpu", "cluster.metrics_log_interval=3"]
    return load_config("classicdp_digits", overrides=[*fixed, *overrides]).config


def rows_of(config: Config) -> list[list[dict[str, Any]]]:
    """The rows of two ranks."""

    def train(comm: Communicator) -> list[dict[str, Any]]:
        sink = Rows()
        parts = prepare(config, comm.rank, ["rank0", "rank1"])
        run_rank(parts, comm, RunContext(sink, comm, threading.Event()))
        return sink.rows

    found: list[list[dict[str, Any]]] = run_group(list(inproc_group(2)), train)
    return found


def link_keys(row: dict[str, Any]) -> set[str]:
    return {key for key in row if key.startswith("link/rank")}


def test_due_rows_have_the_columns_of_the_other_rank() -> None:
    for rank, rows in enumerate(rows_of(make_config())):
        assert [row["step"] for row in rows if link_keys(row)] == [0, 3]
        link = f"link/rank{1 - rank}/"
        names = ("bandwidth_bytes_per_s", "rtt_ms", "buffer_bytes", "queued_bytes")
        assert {f"{link}{name}" for name in names} <= link_keys(rows[3])
        assert all("link/sent_bytes" in row for row in rows)


def test_without_track_network_metrics_there_are_none_and_nobody_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolcluster.cluster.world.World.ping", lambda world: pytest.fail("pinged"))
    for rows in rows_of(make_config("cluster.track_network_metrics=false")):
        assert not any(link_keys(row) for row in rows)
        assert all("link/sent_bytes" in row for row in rows)


def test_the_buffers_reach_both_sides() -> None:
    sizes, token = [128 << 10, 256 << 10], b"a token for this test only"
    listeners = [
        listen("127.0.0.1", 0, token=token, run_id="run", rank=rank, options=TcpOptions(buffer_bytes=nbytes))
        for rank, nbytes in enumerate(sizes)
    ]

    def join(rank: int) -> Communicator:
        return join_tcp(
            rank=rank, world_size=2, name=f"rank{rank}", listener=listeners[rank], token=token,
            leader_address=listeners[0].address, run_id="run", patience=5.0, options={}, buffer_bytes=sizes[rank],
        )[1]  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        comms = list(pool.map(join, range(2)))
    granted = []
    for comm in comms:
        assert isinstance(comm, TcpCommunicator)
        granted.append(comm.world.link_state(1 - comm.rank).buffer_bytes)
        comm.close()
    assert granted == sizes


@pytest.mark.parametrize(
    ("buffer_size", "host", "expected"),
    [
        ("null", None, None),
        ("3", None, 3 * MIB),
        ("3", "mini1", 3 * MIB),
        ("{mini1: 4, mini2: 8}", "mini2", 8 * MIB),
        ("{mini1: 4}", "mini2", None),
        ("{box: 5}", None, 5 * MIB),
        ("{box.home: 6}", None, 6 * MIB),
        ("{mini1: 4}", None, None),
    ],
)
def test_buffers_are_those_of_this_host(
    buffer_size: str, host: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box.home")
    options = tcp_options(make_config(f"cluster.buffer_size={buffer_size}", "cluster.patience=7"), host)
    assert (options.patience, options.buffer_bytes) == (7.0, expected)
