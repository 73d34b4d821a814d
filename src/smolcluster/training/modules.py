"""What algorithms that divide a model do to its modules: names, buffers, and one parameter brought to rank 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.kinds import Precision


def parameter_names(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The names of all parameters, tied ones by their first; and for each further name of a tied one its first."""
    firsts = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return list(firsts.values()), {name: firsts[id(param)] for name, param in every if name != firsts[id(param)]}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name."""
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in params}


def move_buffers(model: nn.Module, device: torch.device | str, precision: Precision) -> None:
    """Put all buffers, contiguous, on a device; "fp64" widens those that hold fractions."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_wide = precision == "fp64" and buffer.is_floating_point()
                module._buffers[name] = buffer.to(device, torch.float64 if is_wide else None).contiguous()


def bring_to_first(comm: Communicator, value: Tensor | None, owner: int, tag: int) -> Tensor | None:
    """What rank `owner` has, on rank 0's CPU; None elsewhere. Those two ranks may call it, others need not; blocks.

    Raises:
        PeerLost: the other one is gone.
    """
    if comm.rank == owner:
        assert value is not None
        value = value.detach().cpu()
        if owner == 0:
            return value
        comm.send(value, 0, tag).wait()
    elif comm.rank == 0:
        return comm.recv(owner, tag).result()[0]
    return None
