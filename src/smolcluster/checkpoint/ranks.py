"""Checkpoints of many ranks when only rank 0 has the folder: their shards come to it, and slices go back to them.

Saving    1 exchange who has how much  2 rank 0 asks one rank after the other, which sends tensor by tensor
          3 exchange the outcome: all ranks go on, or all stop
Reading   rank 0 reads; what all want alike is broadcast, slices are sent to the rank that wants them
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

from smolcluster.checkpoint.disk import write_order
from smolcluster.checkpoint.index import DTYPE_OF, DTYPES
from smolcluster.checkpoint.reader import Checkpoint, check_slice, no_such_tensor
from smolcluster.checkpoint.state import Kind, Shard
from smolcluster.checkpoint.store import find_unstorable, save_checkpoint
from smolcluster.collectives.base import Communicator
from smolcluster.errors import CheckpointError, CollectiveMismatch, TrainingStopped
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.transport.tensors import raw_bytes

# Point-to-point tags of this file, far from those that algorithms count up from 0.
_ASK_TAG = 2**29
_SHARD_TAG = 2**29 + 1
_SLICE_TAG = 2**29 + 2


class _Description(TypedDict):
    """A shard on its way to rank 0, without its values."""

    name: str
    kind: Kind
    dtype: str
    local_shape: list[int]
    shape: list[int] | None
    offset: int
    alias_of: str | None


class _Plan(TypedDict):
    """What a rank has for a checkpoint, and what speaks against writing it."""

    step: int
    shards: int
    problem: str | None


class _Known(TypedDict):
    """What every rank knows of a stored tensor."""

    kind: Kind
    dtype: str
    shape: list[int]


def save_from_all_ranks(
    comm: Communicator,
    folder: Path | None,
    step: int,
    shards: Mapping[str, Shard],
    meta: JsonObject,
    confirm: Callable[[], None] | None = None,
) -> None:
    """Write one checkpoint of what all ranks hold. Every rank calls it; blocks until it is on rank 0's disk.

    Rank 0 holds its own shards and one tensor of another rank at a time. Ranks without shards only agree.

    Args:
        comm: all ranks.
        folder: the run's `checkpoints/`; None everywhere but on rank 0.
        step: updates so far, the same on all ranks.
        shards: this rank's part, on any device: together every element of every tensor exactly once.
        meta: see `save_checkpoint`; rank 0's counts.
        confirm: see `save_checkpoint`; called on rank 0.

    Raises:
        TrainingStopped: on every rank, if rank 0 could not write.
        PeerLost: a rank is gone. Rank 0 left nothing unfinished behind.
    """
    plans = cast(
        "list[_Plan]", comm.exchange({"step": step, "shards": len(shards), "problem": find_unstorable(shards)})
    )
    for rank, plan in enumerate(plans):
        if plan["step"] != step:
            raise CollectiveMismatch(f"rank {comm.rank} saves step {step}, rank {rank} step {plan['step']}")
        if plan["problem"] is not None:
            raise TrainingStopped(f"the checkpoint of step {step} cannot be written: rank {rank}: {plan['problem']}")
    failure: str | None = None
    if comm.rank == 0:
        assert folder is not None
        senders = [rank for rank, plan in enumerate(plans) if rank > 0 and plan["shards"]]
        others = _Incoming(comm, senders)
        try:
            save_checkpoint(folder, step, shards, meta, others, confirm)
        except TrainingStopped as exc:
            failure = str(exc)
        others.dismiss()
    elif shards:
        _send_when_asked(comm, shards)
    outcome = comm.exchange(failure)[0]
    if outcome is not None:
        raise TrainingStopped(str(outcome))


class SharedReader:
    """A StateReader (see state.py) for all ranks of a checkpoint that only rank 0 has: all read the same names."""

    def __init__(self, comm: Communicator, checkpoint: Checkpoint | None, known: JsonObject) -> None:
        self._comm = comm
        self._checkpoint = checkpoint
        self._known = cast("dict[str, _Known]", known["tensors"])
        self._step = cast("int", known["step"])
        self._meta = cast("JsonObject", known["meta"])

    @classmethod
    def open(cls, comm: Communicator, checkpoint: Checkpoint | None) -> SharedReader | None:
        """Tell all ranks what rank 0's checkpoint holds. Every rank calls it; None on all if rank 0 has none.

        Args:
            comm: all ranks.
            checkpoint: that of rank 0; the others' are not looked at.
        """
        known: JsonObject | None = None
        if comm.rank == 0 and checkpoint is not None:
            tensors: JsonObject = {name: _known(checkpoint, name) for name in checkpoint.names()}
            known = {"step": checkpoint.step, "meta": checkpoint.meta, "tensors": tensors}
        text = _to_tensor(known)
        size = comm.exchange(text.numel())[0]
        if comm.rank != 0:
            text = torch.empty(cast("int", size), dtype=torch.uint8)
        comm.broadcast(text).wait()
        shared = _from_tensor(text)
        return None if shared is None else cls(comm, checkpoint if comm.rank == 0 else None, cast("JsonObject", shared))

    @property
    def step(self) -> int:
        """Updates that the run had made."""
        return self._step

    @property
    def meta(self) -> JsonObject:
        """What the writer stored beside the tensors, such as the configuration."""
        return self._meta

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted."""
        return sorted(name for name in self._known if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return DTYPE_OF[self._entry(name)["dtype"]]

    def kind(self, name: str) -> Kind:
        """What the tensor is for.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._entry(name)["kind"]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its shape, on the CPU. Every rank calls it; blocks.

        Raises:
            CheckpointError: on every rank: there is no such tensor, or rank 0 cannot read it any more.
            PeerLost: a rank is gone.
        """
        shape = self.shape(name)
        return self._read_for_all(name, 0, math.prod(shape)).view(shape)

    def read_slice(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor from `start` on: (count,), on the CPU. Every rank calls it; blocks.

        Raises:
            CheckpointError: on every rank: there is no such tensor, it is shorter than a rank wants, or rank 0 cannot
                read it any more.
            PeerLost: a rank is gone.
        """
        shape = self.shape(name)
        wishes = cast("list[tuple[str, int, int]]", self._comm.exchange([name, start, count]))
        for wished, first, length in wishes:
            _check_same_name(self._comm, name, wished)
            check_slice(name, shape, first, length)
        if all(tuple(wish) == (name, start, count) for wish in wishes):
            return self._read_for_all(name, start, count)
        return self._read_each(name, [(first, length) for _, first, length in wishes])

    def _read_for_all(self, name: str, start: int, count: int) -> Tensor:
        """All ranks get the same slice."""
        tensor, failure = self._try_read(name, start, count)
        self._agree(name, failure)
        if count:
            self._comm.broadcast(_as_bytes(tensor)).wait()
        return tensor

    def _read_each(self, name: str, slices: list[tuple[int, int]]) -> Tensor:
        """Every rank gets its own slice; rank 0 has one of them in memory, and its own."""
        comm = self._comm
        start, count = slices[comm.rank]
        tensor, failure = self._try_read(name, start, count)
        if comm.rank == 0:
            for rank in range(1, comm.world_size):
                if slices[rank][1]:
                    theirs, error = self._try_read(name, *slices[rank])
                    failure = failure or error
                    comm.send(_as_bytes(theirs), rank, _SLICE_TAG).wait()  # after a failure of no value: see `_agree`
        elif count:
            comm.recv(0, _SLICE_TAG, _as_bytes(tensor)).wait()
        self._agree(name, failure)
        return tensor

    def _try_read(self, name: str, start: int, count: int) -> tuple[Tensor, str | None]:
        """The slice and None; or memory for it, and why it could not be filled. Elsewhere than on rank 0: memory."""
        failure: str | None = None
        if self._checkpoint is not None:
            try:
                return self._checkpoint.read_slice(name, start, count), None
            except CheckpointError as exc:
                failure = str(exc)
        return torch.empty(count, dtype=self.dtype(name)), failure

    def _agree(self, name: str, failure: str | None) -> None:
        outcomes = cast("list[tuple[str, str | None]]", self._comm.exchange([name, failure]))
        for wished, _ in outcomes:
            _check_same_name(self._comm, name, wished)
        if (reason := outcomes[0][1]) is not None:
            raise CheckpointError(reason)

    def _entry(self, name: str) -> _Known:
        try:
            return self._known[name]
        except KeyError:
            raise no_such_tensor(f"the checkpoint of step {self._step}", name) from None


class _Incoming:
    """The other ranks' shards as rank 0 takes them, rank by rank.

    A rank sends when it is asked: else the shards of all would wait in rank 0's memory.
    """

    def __init__(self, comm: Communicator, senders: list[int]) -> None:
        self._comm = comm
        self._waiting = list(senders)
        self._coming: list[tuple[int, str, Tensor]] = []  # what the rank that was asked has still to send, in order

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Shard]]]:
        while self._waiting:
            rank = self._waiting.pop(0)
            self._answer(rank, is_wanted=True)
            yield rank, self._describe(rank)

    def dismiss(self) -> None:
        """Let those go on that were not asked, or not to the end: there is nothing to write, or it failed."""
        while self._coming:
            self._receive(*self._coming[0])
        while self._waiting:
            self._answer(self._waiting.pop(0), is_wanted=False)

    def _answer(self, rank: int, *, is_wanted: bool) -> None:
        self._comm.send(torch.tensor([int(is_wanted)], dtype=torch.uint8), rank, _ASK_TAG).wait()

    def _describe(self, rank: int) -> dict[str, Shard]:
        """What a rank will send, tensor by tensor, as it is asked for."""
        descriptions = cast("list[_Description]", _from_tensor(self._comm.recv(rank, _SHARD_TAG).result()[0]))
        shards: dict[str, Shard] = {}
        for said in descriptions:
            name, shape, alias_of = said["name"], said["shape"], said["alias_of"]
            tensor = torch.empty(said["local_shape"], dtype=DTYPE_OF[said["dtype"]], device="meta")
            load = None if alias_of is not None else functools.partial(self._receive, rank, name, tensor)
            if load is not None:
                self._coming.append((rank, name, tensor))
            whole = None if shape is None else tuple(shape)
            shards[name] = Shard(tensor, said["kind"], whole, said["offset"], load, alias_of)
        return shards

    def _receive(self, rank: int, name: str, like: Tensor) -> Tensor:
        expected = self._coming.pop(0)[:2]
        assert expected == (rank, name), f"rank {rank} sends {expected}, not {name}"
        tensor = torch.empty(like.shape, dtype=like.dtype)
        if tensor.numel():
            self._comm.recv(rank, _SHARD_TAG, _as_bytes(tensor)).wait()
        return tensor


def _send_when_asked(comm: Communicator, shards: Mapping[str, Shard]) -> None:
    """The other side of `_Incoming`."""
    if not comm.recv(0, _ASK_TAG).result()[0].item():
        return
    order = write_order({name: shard.tensor for name, shard in shards.items()})
    comm.send(_to_tensor(cast("JsonValue", [_describe(name, shards[name]) for name in order])), 0, _SHARD_TAG).wait()
    for name in order:
        tensor = shards[name].tensor.detach().to("cpu").contiguous()
        if tensor.numel() and shards[name].alias_of is None:
            comm.send(_as_bytes(tensor), 0, _SHARD_TAG).wait()


def _describe(name: str, shard: Shard) -> _Description:
    return {
        "name": name,
        "kind": shard.kind,
        "dtype": DTYPES[shard.tensor.dtype][0],
        "local_shape": list(shard.tensor.shape),
        "shape": None if shard.shape is None else list(shard.shape),
        "offset": shard.offset,
        "alias_of": shard.alias_of,
    }


def _known(checkpoint: Checkpoint, name: str) -> JsonObject:
    return {
        "kind": checkpoint.kind(name),
        "dtype": DTYPES[checkpoint.dtype(name)][0],
        "shape": list(checkpoint.shape(name)),
    }


def _check_same_name(comm: Communicator, name: str, wished: str) -> None:
    if wished != name:
        raise CollectiveMismatch(f"rank {comm.rank} reads tensor {name!r} of the checkpoint, another rank {wished!r}")


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 (n,): every dtype travels, and so does a tensor of no dimension."""
    return tensor.view(-1).view(torch.uint8)


def _to_tensor(value: JsonValue) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_tensor(tensor: Tensor) -> JsonValue:
    value: JsonValue = json.loads(bytes(raw_bytes(tensor)))
    return value
