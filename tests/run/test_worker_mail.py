"""What a worker, started by itself, tells the server between two connections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from smolcluster.kinds import JsonObject
from smolcluster.run.param_server_node import _WorkerMail


class Session:
    """A session with a server, as far as a mail needs it."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.lost: Exception | None = None
        self.rows: list[Any] = []

    def view(self) -> Any:
        return SimpleNamespace(run_id=self.run_id)

    def error(self) -> Exception | None:
        return self.lost

    def send(self, rank: int, kind: str, payload: JsonObject) -> None:
        assert (rank, kind) == (0, "row")
        self.rows.append(payload["row"])


@pytest.mark.parametrize(("server", "kept"), [("the same", [{"step": 2}]), ("started again", [])])
def test_rows_wait_for_the_same_server_and_not_for_one_that_went_back_to_a_checkpoint(
    server: str, kept: list[JsonObject]
) -> None:
    mail = _WorkerMail(SimpleNamespace())  # type: ignore[arg-type]
    before, after = Session("the same"), Session(server)
    mail.begin(before)  # type: ignore[arg-type]
    mail.write({"step": 1})
    before.lost = ConnectionError("cut")
    mail.write({"step": 2})
    mail.begin(after)  # type: ignore[arg-type]
    assert (before.rows, after.rows) == ([{"step": 1}], kept)
