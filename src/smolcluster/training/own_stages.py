"""The stages of a model that lie on one rank, built without the rest of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonValue, Precision
from smolcluster.models.partition import Unit
from smolcluster.models.stage import Stage, layer_parameters, layers_of, tied_parameters
from smolcluster.training.modules import buffers_of, move_buffers, parameter_names


class OwnStages:
    """This rank's stages. Stage s lies on rank s mod P.

    Attributes:
        model: the whole model, its parameters without values: names and shapes.
        names: of all its parameters, tied ones by their first.
        aliases: for each further name of a tied parameter its first one.
        tied: names of those that the first and the last stage both have.
        number: how many stages there are over all ranks.
        own: this rank's by their number, in order.
        params: this rank's parameters by name.
        owners: for each parameter the rank that answers for it.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Sequence[range],
        comm: Communicator,
        *,
        precision: Precision,
        device: torch.device | str,
        values: Callable[[Unit], Mapping[str, Tensor]] | None,
    ) -> None:
        """Take the model over and give this rank its layers. Blocks until every rank has done so.

        Args:
            model: with values, of which rank 0's count; or on the meta device.
            split: the layers of each stage, over all ranks.
            comm: the ranks.
            precision: "fp64" makes parameters float64.
            device: where this rank computes.
            values: the parameters of a unit by name, for a model on the meta device. The same on every rank.

        Raises:
            ConfigError: the model cannot be cut so.
        """
        every = layers_of(model)
        if [layer for part in split for layer in part] != list(range(len(every))) or not all(split):
            raise ConfigError(
                f"the stages {[list(part) for part in split]} are not the model's {len(every)} layers in order"
            )
        self.tied = tied_parameters(model, every)
        self.names, self.aliases = parameter_names(model)
        self.number = len(split)
        self._comm = comm
        self._device = device
        of_layer = [list(layer_parameters(model, every, layer)) for layer in range(len(every))]
        given = _move_to_meta(model)
        if values is None and any(tensor.is_meta for tensor in given.values()):
            raise ConfigError(
                "the model has parameters on the meta device. Pass values=, which gives those of each unit"
            )
        move_buffers(model, torch.device("cpu"), precision)
        for buffer in model.buffers():
            comm.broadcast(buffer).wait()
        self.model = model.train()
        # Without values a copy of the model is a matter of names.
        self.own = {n: Stage(copy.deepcopy(model), split[n]) for n in range(comm.rank, len(split), comm.world_size)}
        self._installed: Mapping[str, nn.Parameter] = {}
        self._places: dict[str, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        for stage in self.own.values():
            move_buffers(stage.module, device, precision)
            self._find_places(stage)
        self.params: dict[str, nn.Parameter] = {}
        dtype = torch.float64 if precision == "fp64" else None
        if values is None:
            for name in self.names:
                value = given.pop(name).contiguous()
                comm.broadcast(value).wait()
                self._fill({name: value}, dtype)
            self._check()
            return
        for stage in self.own.values():
            for layer in stage.layers:
                wanted = tuple(name for name in of_layer[layer] if name not in self.params)
                if wanted:
                    self._fill(values(Unit("", stage.module, wanted)), dtype)
        for name in self.tied:  # another machine may have another file; all other parameters are on one rank only
            param = self.params.get(name)
            tensor = torch.empty(model.get_parameter(name).shape, dtype=dtype) if param is None else param.detach()
            comm.broadcast(tensor).wait()
        self._check()

    def trained(self) -> dict[str, nn.Parameter]:
        """This rank's parameters that are to be trained, by name."""
        return {name: param for name, param in self.params.items() if param.requires_grad}

    def install(self, params: Mapping[str, nn.Parameter]) -> None:
        """Let the stages compute with these parameters, until it is called again; the mapping must not change."""
        if params is self._installed:
            return
        self._installed = params
        for name, param in params.items():
            for held, key in self._places[name]:
                held[key] = param

    def answers_for(self, name: str) -> bool:
        """Whether this rank answers for a parameter: one that two ranks have counts once, on the first."""
        return name in self.params and not (name in self.tied and self._comm.rank > 0)

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers that this rank answers for, by name: of its layers, and on rank 0 of no layer."""
        found: dict[str, Tensor] = {}
        in_layers = {
            f"{module}."
            for part in (layers_of(self.model),)
            for layer in range(len(part))
            for module in part.modules(layer)
        }
        own = {name: tensor for stage in self.own.values() for name, tensor in buffers_of(stage.module).items()}
        for name in buffers_of(self.model):
            is_of_layer = any(name.startswith(prefix) for prefix in in_layers)
            if name in own and (is_of_layer or self._comm.rank == 0):
                found[name] = own[name]
        return found

    def collect_buffers(self) -> None:
        """Bring `model`'s persistent buffers up to date, from whoever has them. Every rank calls it; blocks."""
        own = self.buffers()
        for name, owner in self._buffer_owners.items():
            held = self.model.get_buffer(name)
            if name in own:
                held.copy_(own[name])
            self._comm.broadcast(held, src=owner).wait()

    # ---- making

    def _find_places(self, stage: Stage) -> None:
        names = {id(param): name for name, param in stage.parameters.items()}
        for module in stage.module.modules():
            for key, param in module._parameters.items():
                if param is not None and id(param) in names:
                    self._places.setdefault(names[id(param)], []).append((module._parameters, key))

    def _fill(self, values: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        for name, value in values.items():
            if name in self._places:
                held, key = self._places[name][0]
                described = held[key]
                assert described is not None
                kept = value.detach().to(self._device, dtype if value.is_floating_point() else None)
                self.params[name] = nn.Parameter(kept, requires_grad=described.requires_grad)
                self.install({name: self.params[name]})

    def _check(self) -> None:
        mine: JsonValue = [[name for name in self.params if self.answers_for(name)], list(self.buffers())]
        each = cast("list[tuple[list[str], list[str]]]", self._comm.exchange(mine))
        self.owners = {name: rank for rank, (names, _) in enumerate(each) for name in names}
        self._buffer_owners = {name: rank for rank, (_, names) in enumerate(each) for name in names}
        assert self.owners.keys() == set(self.names), "every parameter has one owner"


def _move_to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Take the values out of a model; by their names."""
    given = {name: param.detach() for name, param in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
                module._parameters[key] = made[id(param)]
    return given
