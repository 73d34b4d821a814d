from __future__ import annotations

import pytest
import torch

from smolcluster.device import prepare_process


@pytest.fixture(autouse=True)
def _one_torch_thread_and_a_fixed_seed() -> None:
    prepare_process()
    torch.manual_seed(0)
