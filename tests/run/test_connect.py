"""`smolcluster.connect()`: world size 1 without a launcher, its job with one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smolcluster
from smolcluster.errors import ConfigError

SOURCE = str(Path(smolcluster.__file__).parent.parent)

# A user's own loop, as CONTRACT section 6 shows it.
SCRIPT = """
import json, torch
import smolcluster as smol

comm = smol.connect()
torch.manual_seed(comm.rank)  # other weights on each rank: ClassicDP starts from rank 0's
model = torch.nn.Linear(4, 3)
strategy = smol.ClassicDP(model, smol.optimizer_factory("adamw", 0.1), comm)
for step in range(5):
    generator = torch.Generator().manual_seed(10 * step + comm.rank)
    inputs = torch.randn(8, 4, generator=generator)
    result = strategy.train_step([(inputs, inputs.argmax(1) % 3)])
weights = [value for param in model.parameters() for value in param.flatten().tolist()]
print(json.dumps([comm.rank, comm.world_size, result.samples, result.loss, weights]))
comm.close()
"""


@pytest.mark.slow
def test_a_script_under_a_launcher_trains_with_all_ranks() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": SOURCE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "SMOLCLUSTER_TOKEN": "a token for this test only",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    (rank0, size0, samples, loss0, weights0), (rank1, size1, _, loss1, weights1) = (
        json.loads(rank.communicate(timeout=60)[0]) for rank in ranks
    )
    assert (rank0, rank1, size0, size1, samples) == (0, 1, 2, 2, 16)
    assert loss0 == loss1
    assert weights0 == weights1


def test_without_a_launcher_the_world_has_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    comm = smolcluster.connect()
    try:
        assert (comm.rank, comm.world_size) == (0, 1)
        tensor = torch.tensor([3.0])
        comm.all_reduce(tensor).wait()
        assert tensor.item() == 3.0
        assert torch.get_num_threads() == 1
    finally:
        comm.close()
        torch.set_num_threads(threads)


def test_a_launcher_without_a_token_is_told_how_to_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SMOLCLUSTER_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="smolcluster token new"):
        smolcluster.connect(token_file=tmp_path / "no-token")
