"""Tables: matrices that are split by rows and whole on no rank, such as a large embedding or the head of a model.

A look-up needs few rows. Each rank asks the owners for those of its tokens, and sends their gradients back to them. A
projection x @ table.T needs all rows, but not at once: the table passes by in stripes, each gathered while the one
before computes its columns of the output, and let go. Backward takes the stripes in reverse, and each one's gradient
leaves by a reduce-scatter while the next one's is computed. A table that is used in both ways (tied weights) does both.

    look-up       unique row numbers -> owners | rows <- owners   ...backward:  rows' gradients -> owners
    projection    gather a | gather b  | gather c  |   ...backward:  gather b  | gather a  |
                           | out[:, a] | out[:, b] | out[:, c]   | dx, dc    | dx, db    | dx, da

Cost: with T different tokens of a rank, look-ups send T (N-1)/N rows there and back. For a projection the table is
gathered twice, its last stripe once, and reduced once; two stripes lie in memory, none larger than the largest unit.
Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5.3; Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053, section 3 (vocabulary by rows; there the ranks compute one batch together, here each its own).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from smolcluster.collectives.gather import ShardedParameters, UnitGather, UnitHooks
from smolcluster.collectives.scatter import RowGradients, ShardedGradients
from smolcluster.errors import ConfigError


class RowWeight(Tensor):
    """What a module has in place of a table: a tensor of its shape, dtype and device, without elements.

    `F.embedding` and `F.linear` work with it, so `nn.Embedding` and `nn.Linear` do; nothing else does.

    Attributes:
        param_name: the parameter's name in the model.
        table: computes; None until `connect_tables`.
    """

    param_name: str
    table: RowTable | None
    _is_param = True  # so that isinstance(weight, nn.Parameter) holds

    @staticmethod
    def __new__(
        cls, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str, requires_grad: bool
    ) -> RowWeight:
        weight: RowWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device(device), requires_grad=requires_grad
        )
        weight.param_name = name
        weight.table = None
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is not typed
        return f"RowWeight({self.param_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if func is torch.ops.aten.detach.default:  # state_dict() asks for it
            return cls(weight.param_name, weight.shape, weight.dtype, weight.device, requires_grad=False)
        raise ConfigError(
            f"{weight.param_name} is split by rows over the ranks and whole on none: in stage 3 it works in embedding "
            f"look-ups and linear projections only, and the model calls {func} with it. Set cluster.fsdp_stage to 2"
        )


def _embedding(
    input: Tensor,
    weight: RowWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """See `torch.nn.functional.embedding`."""
    for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if value:
            raise ConfigError(
                f"the embedding of {weight.param_name} has {name}={value}, which needs all of it, but in stage 3 it "
                f"is split by rows over the ranks. Leave {name} out, or set cluster.fsdp_stage to 2"
            )
    assert weight.table is not None, "connect_tables was not called"
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return weight.table.look_up(input, padding_idx)


def _linear(input: Tensor, weight: RowWeight, bias: Tensor | None = None) -> Tensor:
    """See `torch.nn.functional.linear`."""
    assert weight.table is not None, "connect_tables was not called"
    return weight.table.project(input, bias)


def connect_tables(
    shards: ShardedParameters, gather: UnitGather, hooks: UnitHooks, gradients: ShardedGradients
) -> None:
    """Let the tables of a model compute with the rows that these gather, and give these their gradients."""
    for number, bucket in enumerate(shards.buckets):
        if bucket.is_table:
            weight = shards.params[bucket.places[0].index]
            assert isinstance(weight, RowWeight)
            weight.table = RowTable(weight, number, shards, gather, hooks, gradients)


class RowTable:
    """Looks rows of a table up and multiplies with all of them. Every rank makes the same calls, in the same order."""

    def __init__(
        self,
        weight: RowWeight,
        number: int,
        shards: ShardedParameters,
        gather: UnitGather,
        hooks: UnitHooks,
        gradients: ShardedGradients,
    ) -> None:
        """Compute with the bucket `number`, of which all ranks own a part.

        Args:
            weight: what the model has in its place.
            number: the bucket's.
            shards: all ranks' parts.
            gather: gives the stripes; rows are looked up over its connections.
            hooks: prefetches each stripe's neighbour.
            gradients: takes their gradients.
        """
        self.name = weight.param_name
        self.height, self.width = weight.shape
        self.is_trained = weight.requires_grad
        bucket = shards.buckets[number]
        self.index = bucket.places[0].index
        self.gradients = gradients
        self._comm = gather.comm
        self._shards = shards
        self._hooks = hooks
        self._own = shards.own[number].view(-1, self.width)
        in_order = [n for n, stripe in enumerate(shards.stripes) if stripe.bucket == number]
        self.stripes = sorted(in_order, key=lambda n: shards.stripes[n].start)
        # Row numbers have no gradient, so autograd is given something that has.
        self._anchor = torch.zeros((), device=weight.device, requires_grad=self.is_trained)

    # ---- look-ups

    def look_up(self, ids: Tensor, padding: int | None) -> Tensor:
        """The rows `ids` of the table: (*ids.shape, D), in full precision. Blocks until their owners have sent them.

        Args:
            ids: any shape, integers.
            padding: the row that gets no gradient, if any.

        Raises:
            IndexError: the table has no such row.
            PeerLost: a rank is gone.
        """
        # Autograd's functions run without gradients, so what it would do is asked for here.
        remembers = torch.is_grad_enabled() and self.is_trained
        found: Tensor = _LookUp.apply(self._anchor, self, ids, padding, remembers)  # type: ignore[no-untyped-call]
        return found

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor, _Request]:
        """The different rows among `ids`, for each id which of them it is, and who asked whom for what."""
        if ids.numel():
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= self.height:
                raise IndexError(f"look-up in {self.name}: ids from {low} to {high}, but it has {self.height} rows")
        unique, places = torch.unique(ids, return_inverse=True)  # sorted, so owner by owner
        height = self._own.shape[0]
        counts = torch.bincount(unique // height, minlength=self._comm.world_size).tolist()
        with self._comm.telemetry.span("comm_wait"):
            wanted = self._comm.all_to_all_ragged((unique % height).to("cpu", torch.int32).split(counts)).result()
            asked = [rows.to(ids.device, torch.int64) for rows in wanted]
            rows = self._own.new_empty(len(unique), self.width)
            sent = self._own.index_select(0, torch.cat(asked))
            self._comm.all_to_all(rows, sent, counts, [len(rows) for rows in asked]).wait()
        return rows, places, _Request(unique, counts, asked)

    def send_back(self, request: _Request, counts: bool) -> RowGradients:
        """Give the owners of the rows their gradients: zeros where none count, as other ranks may have some."""
        found = request.grads if counts else None
        grads = self._own.new_zeros(len(request.unique), self.width) if found is None else found
        arriving = self._own.new_empty(sum(map(len, request.asked)), self.width)
        work = self._comm.all_to_all(arriving, grads, [len(rows) for rows in request.asked], request.counts)
        return RowGradients(self.index, request.asked, arriving, work, found is not None)

    # ---- projections

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ table.T + bias: (..., D) to (..., V), in the dtype that `F.linear` would compute in.

        Raises:
            PeerLost: a rank is gone.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
            bias = None if bias is None else bias.to(x.dtype)
        self._hooks.follow([self._shards.stripes[number].unit for number in self.stripes])
        comes_back = torch.is_grad_enabled() and (self.is_trained or x.requires_grad)
        if comes_back and self.is_trained:
            self.gradients.expect(self.index)
        with torch.autocast(kind, enabled=False):
            logits: Tensor = _Projection.apply(self._anchor, x, bias, self, comes_back)  # type: ignore[no-untyped-call]
        return logits

    def each_forward(self, *, comes_back: bool) -> Iterator[tuple[int, Tensor]]:
        """Each stripe's number and rows (N, rows of a rank, D), gathered; the next one is on its way meanwhile."""
        for number in self.stripes:
            unit = self._shards.stripes[number].unit
            self._hooks.before_forward(unit)
            yield number, self.by_rank(self._shards.whole[number])
            self._hooks.after_forward(unit, comes_back=comes_back)

    def each_backward(self) -> Iterator[tuple[int, Tensor]]:
        """The same from the last to the first."""
        for number in reversed(self.stripes):
            unit = self._shards.stripes[number].unit
            self._hooks.before_backward(unit)
            yield number, self.by_rank(self._shards.whole[number])
            self._hooks.done(unit)

    def by_rank(self, flat: Tensor) -> Tensor:
        """A stripe, or its gradient, as (N, rows of a rank, D)."""
        return flat.view(self._comm.world_size, -1, self.width)

    def strips(self, number: int) -> list[slice]:
        """For each rank, which rows of the table its part of a stripe holds; padding left out."""
        stripe = self._shards.stripes[number]
        start, rows = stripe.start // self.width, stripe.length // self.width
        firsts = [rank * self._own.shape[0] + start for rank in range(self._comm.world_size)]
        return [slice(min(first, self.height), min(first + rows, self.height)) for first in firsts]


@dataclass(slots=True)
class _Request:
    """Who asked whom for what in a look-up, and the gradients of this rank's rows once they are known.

    Attributes:
        unique: the rows that this rank looked up, in order.
        counts: how many of them each rank owns.
        asked: for each rank, which of this rank's rows it looked up.
        grads: (unique rows, D).
    """

    unique: Tensor
    counts: list[int]
    asked: list[Tensor]
    grads: Tensor | None = None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: RowTable, ids: Tensor, padding: int | None, remembers: bool) -> Tensor:
        rows, places, request = table.fetch(ids)
        if remembers:
            table.gradients.remember(functools.partial(table.send_back, request))
        ctx.save_for_backward(places)
        ctx.request, ctx.padding = request, padding
        return F.embedding(places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        request: _Request = ctx.request
        (places,) = ctx.saved_tensors
        # What embeddings use themselves: also on a GPU it adds in the same order each time.
        grads = torch.ops.aten.embedding_dense_backward(grad, places, len(request.unique), -1, False)
        if ctx.padding is not None:
            grads.masked_fill_((request.unique == ctx.padding).unsqueeze(1), 0)
        request.grads = grads
        return None, None, None, None, None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, bias: Tensor | None, table: RowTable, comes_back: bool) -> Tensor:
        flat = x.reshape(-1, table.width)
        out = flat.new_empty(flat.shape[0], table.height)
        for number, by_rank in table.each_forward(comes_back=comes_back):
            for rows, strip in zip(by_rank, table.strips(number), strict=True):
                weight = rows[: strip.stop - strip.start].to(x.dtype).t()
                if bias is None:
                    torch.mm(flat, weight, out=out[:, strip])
                else:
                    torch.addmm(bias[strip], flat, weight, out=out[:, strip])
        ctx.save_for_backward(x)
        ctx.table, ctx.comes_back = table, comes_back
        return out.view(*x.shape[:-1], table.height)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table: RowTable = ctx.table
        (x,) = ctx.saved_tensors
        flat, grad = x.reshape(-1, table.width), grad.reshape(-1, table.height)
        # A sum of stripes in half precision would be rounded as often as there are stripes.
        dx = torch.zeros_like(flat, dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype)
        for number, by_rank in table.each_backward() if ctx.comes_back else ():
            room, is_new = table.gradients.room(number) if table.is_trained else (None, False)
            for rank, strip in enumerate(table.strips(number)):
                count = strip.stop - strip.start
                _add_product(dx, grad[:, strip], by_rank[rank, :count].to(x.dtype))
                if room is not None:
                    own = table.by_rank(room)[rank]
                    _add_product(own[:count], grad[:, strip].t(), flat, is_new=is_new)
                    own[count:].zero_()
            if room is not None:
                table.gradients.give(number)
        bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return None, dx.to(x.dtype).view(x.shape), bias, None, None


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, is_new: bool = False) -> None:
    """out += left @ right; with `is_new` whatever is in `out` counts as zero."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=0 if is_new else 1)
    elif is_new:
        out.copy_(left @ right)
    else:
        out.add_(left @ right)
