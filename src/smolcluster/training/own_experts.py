"""What of a model with experts lies on one rank: its experts, and all that is no expert; and how it is checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.dispatch import expert_ranges
from smolcluster.errors import ConfigError
from smolcluster.kinds import Precision
from smolcluster.models.moe import moe_layers
from smolcluster.models.partition import Unit, split_into_units
from smolcluster.training.modules import bring_to_first, buffers_of, move_buffers, parameter_names
from smolcluster.training.optim import optimizer_state
from smolcluster.training.restore import Part, load_parts
from smolcluster.training.step import Shard, StateReader

_PARAMETER_TAG = 2**29 + 41


class OwnExperts:
    """This rank's parameters.

    Attributes:
        model: the whole model; other ranks' experts are on the meta device: names and shapes.
        names: of all its parameters, tied ones by their first.
        aliases: for each further name of a tied parameter its first one.
        owners: of each expert's parameter the rank that has it; what is no expert is on all ranks.
        params: this rank's parameters by name, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        precision: Precision,
        device: torch.device | str,
        values: Callable[[Unit], Mapping[str, Tensor]] | None,
    ) -> None:
        """Take the model over. Blocks until every rank has its parameters, which are rank 0's where ranks share them.

        The seed of the routers' noise is rank 0's too.

        Args:
            model: with values, of which rank 0's count; or on the meta device.
            comm: the ranks.
            precision: "fp64" makes parameters float64.
            device: where this rank computes.
            values: the parameters of a unit by name, for a model on the meta device. The same on every rank.

        Raises:
            ConfigError: the model has no experts, or no values.
        """
        layers = moe_layers(model)
        if not layers:
            raise ConfigError(
                f"a {type(model).__name__} has no experts that could lie on several ranks. Set model.type moe, or "
                "choose algorithm classicdp"
            )
        self.model = model.train()
        self.names, self.aliases = parameter_names(model)
        self.owners: dict[str, int] = {}
        for layer_name, layer in layers.items():
            for rank, experts in enumerate(expert_ranges(len(layer.experts), comm.world_size)):
                for number in experts:
                    prefix = f"{layer_name}.experts.{number}"
                    self.owners |= {f"{prefix}.{n}": rank for n, _ in layer.experts[number].named_parameters()}
        self.params: dict[str, nn.Parameter] = {}
        self._comm = comm
        self._device = device
        self._dtype = torch.float64 if precision == "fp64" else None
        move_buffers(model, device, precision)
        for buffer in model.buffers():
            comm.broadcast(buffer).wait()
        # Noise is a sample's, wherever it is computed, and `single` with rank 0's model has that of rank 0.
        seeds = comm.exchange([layer.noise_seed for layer in layers.values()])[0]
        assert isinstance(seeds, list)
        for layer, seed in zip(layers.values(), seeds, strict=True):
            assert isinstance(seed, int)
            layer.noise_seed = seed
        given = {name: param.detach() for name, param in model.named_parameters()}
        if values is not None:
            self._build(values)
        elif any(value.is_meta for value in given.values()):
            raise ConfigError(
                "the model has parameters on the meta device. Pass values=, which gives those of each unit"
            )
        else:
            self._divide(given)
        self.params = {name: self.params[name] for name in self.names if name in self.params}

    def answers_for(self, name: str) -> bool:
        """Whether this rank answers for a parameter: what all ranks have counts once, on rank 0."""
        return name in self.params and self._comm.rank == self.owners.get(name, 0)

    def shared(self) -> dict[str, nn.Parameter]:
        """The parameters to train that all ranks have."""
        return {n: p for n, p in self.params.items() if n not in self.owners and p.requires_grad}

    def experts(self) -> dict[str, nn.Parameter]:
        """The parameters to train of the experts here."""
        return {n: p for n, p in self.params.items() if n in self.owners and p.requires_grad}

    def whole_parameter(self, name: str) -> Tensor | None:
        """A parameter as it is now, on rank 0's CPU; None elsewhere. Every rank calls it; blocks.

        Raises:
            KeyError: the model has no such parameter.
            PeerLost: a rank is gone.
        """
        name = self.aliases.get(name, name)
        if name not in self.names:
            raise KeyError(name)
        return bring_to_first(self._comm, self.params.get(name), self.owners.get(name, 0), _PARAMETER_TAG)

    # ---- checkpoints

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Shard]:
        """Weights, buffers and optimizer state that this rank answers for. Shares their memory."""
        brought = {name: param for name, param in self.params.items() if self.answers_for(name)}
        found = {f"model/{name}": Shard(param.detach(), "param") for name, param in brought.items()}
        found |= optimizer_state(optimizer, {name: param for name, param in brought.items() if param.requires_grad})
        if self._comm.rank == 0:
            found |= {f"model/{name}": Shard(buffer, "buffer") for name, buffer in buffers_of(self.model).items()}
            for alias, name in self.aliases.items():
                shape = tuple(self.params[name].shape)
                found[f"model/{alias}"] = Shard(torch.empty(0), "param", shape, alias_of=f"model/{name}")
        return found

    def load_state(self, optimizer: torch.optim.Optimizer, reader: StateReader) -> None:
        """Take over weights, buffers and optimizer state, in place; every rank reads the same names.

        Raises:
            CheckpointError: it is of another model.
        """
        load_parts(
            reader,
            optimizer,
            shapes={name: tuple(self.model.get_parameter(name).shape) for name in self.names},
            aliases=self.aliases,
            parts={name: Part(0, param) for name, param in self.params.items()},
            buffers=buffers_of(self.model),
        )

    # ---- making

    def _build(self, values: Callable[[Unit], Mapping[str, Tensor]]) -> None:
        """Only what this rank has is ever built."""
        for unit in split_into_units(self.model):
            wanted = tuple(name for name in unit.parameters if self._is_here(name))
            found = values(Unit(unit.name, unit.module, wanted)) if wanted else {}
            for name in wanted:
                value = found[name].detach()
                if name not in self.owners:  # another machine may have another file
                    value = value.contiguous()
                    self._comm.broadcast(value).wait()
                self._keep(name, value)

    def _divide(self, given: dict[str, Tensor]) -> None:
        for name in self.names:
            value = given.pop(name).contiguous()
            self._comm.broadcast(value).wait()
            if self._is_here(name):
                self._keep(name, value)
            else:
                self._put(name, torch.empty_like(value, device="meta"))

    def _is_here(self, name: str) -> bool:
        return self.owners.get(name, self._comm.rank) == self._comm.rank

    def _keep(self, name: str, value: Tensor) -> None:
        self.params[name] = self._put(name, value.to(self._device, self._dtype if value.is_floating_point() else None))

    def _put(self, name: str, value: Tensor) -> nn.Parameter:
        """In the places of a parameter."""
        old = self.model.get_parameter(name)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        for module in self.model.modules():
            for key, param in module._parameters.items():
                if param is old:
                    module._parameters[key] = new
        return new
