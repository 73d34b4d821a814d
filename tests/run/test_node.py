"""A machine of a cluster, as a thread of this process."""

from pathlib import Path

import pytest

from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.config.load import load_config
from smolcluster.errors import PeerLost
from smolcluster.monitoring.reporters import QuietReporter
from smolcluster.run.folder import Ran
from smolcluster.run.node import NodeOptions, _NodeRun


def test_a_machine_without_a_log_says_that_another_is_lost_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("classicdp_digits", overrides=["training.device=cpu"]).config

    def rank(comm: LocalCommunicator) -> Ran | None:
        if comm.rank == 0:
            comm.abort(PeerLost("rank 0 is lost", 0))
            return None
        return _NodeRun(config, 1, ["a", "b"], NodeOptions(tmp_path / "run", QuietReporter())).run(lambda: (None, comm))

    ran = LocalGroup(2).run(rank)[1]
    assert ran == Ran(3, error="rank 0 is lost")
    # No handler takes these on such a machine, so Python would show them, traceback and all.
    assert not [record for record in caplog.records if record.exc_info]
