"""What every engine checks of a call before it does anything: mistakes that one rank makes on its own.

They are ValueErrors, raised by the call itself; nothing was sent and the other ranks never hear of it. What can only be
seen by comparing ranks is a CollectiveMismatch, and the engine's business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec, ReduceOp
from smolcluster.collectives.codec import ErrorFeedback
from smolcluster.errors import FrameError
from smolcluster.kinds import JsonValue

# `exchange` is for small agreements; every rank holds world_size of them.
MAX_MESSAGE_BYTES = 2**20


def check_contiguous(tensor: Tensor, name: str) -> None:
    """Refuse a tensor whose elements do not lie one after the other, as its raw bytes would not be its values."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()} and is not contiguous: "
            "call .contiguous() first"
        )


def check_reducible(dtype: torch.dtype, op: ReduceOp, codec: Codec | ErrorFeedback | None) -> None:
    """Refuse dtypes that cannot be added, averaged or encoded."""
    if dtype == torch.bool or dtype.is_complex:
        raise ValueError(f"{dtype} tensors cannot be reduced: convert to a number first")
    if not dtype.is_floating_point and op == ReduceOp.AVG:
        raise ValueError(f"the average of {dtype} is not an integer: use SUM, or convert to a floating-point dtype")
    if not dtype.is_floating_point and codec is not None:
        raise ValueError(f"codec {codec.name} encodes floating-point tensors, not {dtype}: use codec=None")


def check_rank(rank: int, world_size: int, name: str) -> None:
    """Refuse a rank that is not in the group."""
    if not 0 <= rank < world_size:
        raise ValueError(f"{name} is rank {rank}, but this group has ranks 0 to {world_size - 1}")


def check_all_reduce(tensor: Tensor, op: ReduceOp, codec: Codec | ErrorFeedback | None) -> None:
    """The arguments of `all_reduce`."""
    check_contiguous(tensor, "tensor")
    check_reducible(tensor.dtype, op, codec)
    if isinstance(codec, ErrorFeedback):
        residual = codec.residual
        if op == ReduceOp.MAX:
            raise ValueError("error feedback makes up for what sums have lost, a maximum loses nothing that adds up")
        if residual.dtype != tensor.dtype or residual.shape != (tensor.numel(),) or not residual.is_contiguous():
            raise ValueError(
                f"a residual of {residual.dtype} {tuple(residual.shape)} for {tensor.numel()} elements of "
                f"{tensor.dtype}: it must be flat and alike"
            )


def check_scattered(tensors: Sequence[Tensor]) -> None:
    """The arguments of `all_reduce_scattered`."""
    if not tensors:
        raise ValueError("all_reduce_scattered needs at least one tensor")
    for index, tensor in enumerate(tensors):
        check_contiguous(tensor, f"tensors[{index}]")
        if tensor.dtype != tensors[0].dtype or not tensor.is_cpu:
            raise ValueError(
                f"tensors[{index}] is {tensor.dtype} on {tensor.device}, tensors[0] is {tensors[0].dtype}: all must be "
                "of one dtype, on the CPU"
            )
    check_reducible(tensors[0].dtype, ReduceOp.SUM, None)


def check_reduce_scatter(output: Tensor, input: Tensor, op: ReduceOp, codec: Codec | None, world_size: int) -> None:
    """The arguments of `reduce_scatter`."""
    _check_parts("input", input, "output", output, world_size)
    check_reducible(input.dtype, op, codec)


def check_all_gather(output: Tensor, input: Tensor, codec: Codec | None, world_size: int) -> None:
    """The arguments of `all_gather`."""
    _check_parts("output", output, "input", input, world_size)
    if codec is not None:
        check_reducible(input.dtype, ReduceOp.SUM, codec)


def check_broadcast(tensor: Tensor, src: int, world_size: int) -> None:
    """The arguments of `broadcast`."""
    check_contiguous(tensor, "tensor")
    check_rank(src, world_size, "src")


def check_all_to_all(
    output: Tensor,
    input: Tensor,
    output_rows: Sequence[int] | None,
    input_rows: Sequence[int] | None,
    world_size: int,
) -> tuple[list[int], list[int]]:
    """The arguments of `all_to_all`; returns (output_rows, input_rows) with equal parts filled in."""
    check_contiguous(output, "output")
    check_contiguous(input, "input")
    if output.dtype != input.dtype:
        raise ValueError(f"output is {output.dtype} and input {input.dtype}: both must have one dtype")
    if output.dim() == 0 or input.dim() == 0 or output.shape[1:] != input.shape[1:]:
        raise ValueError(
            f"output {tuple(output.shape)} and input {tuple(input.shape)} must have rows of the same shape"
        )
    return (
        _rows("output", output.shape[0], output_rows, world_size),
        _rows("input", input.shape[0], input_rows, world_size),
    )


def check_ragged(inputs: Sequence[Tensor], world_size: int) -> None:
    """The arguments of `all_to_all_ragged`."""
    if len(inputs) != world_size:
        raise ValueError(f"{len(inputs)} inputs for {world_size} ranks: give one for every rank, empty ones too")
    for dst, tensor in enumerate(inputs):
        check_contiguous(tensor, f"the input for rank {dst}")
    dtypes = sorted({str(tensor.dtype) for tensor in inputs})
    if len(dtypes) > 1:
        raise ValueError(f"the inputs have dtypes {', '.join(dtypes)}: all must have one")


def check_peer(rank: int, peer: int, tag: int, world_size: int, name: str) -> None:
    """The peer and tag of `send` and `recv`."""
    check_rank(peer, world_size, name)
    if peer == rank:
        raise ValueError(f"{name} is rank {rank} itself: copy the tensor instead")
    if not 0 <= tag < 2**30:
        raise ValueError(f"tag is {tag}: use 0 to {2**30 - 1}")


def check_split(ranks: Sequence[int], world_size: int) -> list[int]:
    """The ranks of `split`, as a list."""
    members = list(ranks)
    for rank in members:
        check_rank(rank, world_size, "a member")
    if len(set(members)) != len(members):
        raise ValueError(f"ranks {members} name a rank twice")
    return members


def encode_message(message: JsonValue) -> bytes:
    """The JSON of an `exchange`.

    Raises:
        ValueError: it is too large.
        TypeError: it is not JSON.
    """
    encoded = json.dumps(message).encode()
    if len(encoded) > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"a message of {len(encoded)} bytes, at most {MAX_MESSAGE_BYTES} can be exchanged: use broadcast or "
            "all_gather for tensors"
        )
    return encoded


def decode_message(encoded: bytes, rank: int) -> JsonValue:
    """What `rank` put into an `exchange`.

    Raises:
        FrameError: it is not JSON.
    """
    try:
        message: JsonValue = json.loads(encoded.decode())
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"rank {rank} exchanged a message that is not JSON") from exc
    return message


def _check_parts(whole_name: str, whole: Tensor, part_name: str, part: Tensor, world_size: int) -> None:
    check_contiguous(whole, whole_name)
    check_contiguous(part, part_name)
    if whole.dtype != part.dtype:
        raise ValueError(f"{whole_name} is {whole.dtype} and {part_name} {part.dtype}: both must have one dtype")
    if whole.numel() != world_size * part.numel():
        raise ValueError(
            f"{whole_name} has {whole.numel()} elements and {part_name} {part.numel()}: for {world_size} ranks "
            f"{whole_name} needs {world_size * part.numel()}"
        )


def _rows(name: str, total: int, rows: Sequence[int] | None, world_size: int) -> list[int]:
    if rows is None:
        if total % world_size:
            raise ValueError(f"{name} has {total} rows, which {world_size} ranks do not divide: give {name}_rows")
        return [total // world_size] * world_size
    if len(rows) != world_size or sum(rows) != total or min(rows) < 0:
        raise ValueError(f"{name}_rows {list(rows)} do not split the {total} rows of {name} over {world_size} ranks")
    return list(rows)
