"""What stages send each other: a small header of JSON and, behind it, rows of activations as they lie in memory.

    4 bytes   length of the header, little-endian
    header    JSON, then zeros up to a multiple of ALIGNMENT bytes from the message's beginning
    rows      raw, in the dtype and shape that the header names

A message is one uint8 tensor, so it is one frame of the communicator, with its generation on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from smolcluster.models.decoder import Segment
from smolcluster.serving.executor import MicroBatch, NewTokens, Opened
from smolcluster.serving.sampling import Sampled, Sampling

ALIGNMENT = 64
_LENGTH_BYTES = 4
_DECIMALS = 6
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64,
)}  # fmt: skip


def pack_batch(batch: MicroBatch, x: Tensor, seconds: Sequence[float] = ()) -> Tensor:
    """A micro-batch for the next stage.

    Args:
        batch: as it came.
        x: ids (N,), or what the layers so far have given (N, D).
        seconds: that the stages so far have computed.
    """
    header: dict[str, Any] = {
        "number": batch.number,
        "segments": [tuple(segment) for segment in batch.segments],
        "wanted": batch.wanted,
        "rows": [str(x.dtype).removeprefix("torch."), *x.shape],
        "seconds": [round(each, _DECIMALS) for each in seconds],
    }
    if batch.opened:
        header["opened"] = [
            [slot, asdict(opened.sampling), opened.context if opened.needs_context else [], opened.drawn]
            for slot, opened in batch.opened.items()
        ]
    return _pack(header, x)


def unpack_batch(message: Tensor) -> tuple[MicroBatch, Tensor, list[float]]:
    """What `pack_batch` has packed, without the tokens; the rows share the message's memory."""
    header, rest = _unpack(message)
    name, *shape = header["rows"]
    opened = {
        slot: Opened(Sampling(**sampling), tuple(context), drawn)
        for slot, sampling, context, drawn in header.get("opened", ())
    }
    segments = [Segment(*segment) for segment in header["segments"]]
    batch = MicroBatch(header["number"], segments, (), [(slot, row) for slot, row in header["wanted"]], opened)
    return batch, rest.view(_DTYPES[name]).view(shape), header["seconds"]


def pack_tokens(found: NewTokens) -> Tensor:
    """New tokens for the engine."""
    tokens = [[slot, each.token, each.logprob, each.top, each.failure] for slot, each in found.tokens.items()]
    seconds = [round(each, _DECIMALS) for each in found.seconds]
    return _pack({"number": found.number, "tokens": tokens, "seconds": seconds}, None)


def unpack_tokens(message: Tensor) -> NewTokens:
    """What `pack_tokens` has packed."""
    header, _ = _unpack(message)
    tokens = {
        slot: Sampled(token, logprob, tuple((int(each), float(value)) for each, value in top), failure)
        for slot, token, logprob, top, failure in header["tokens"]
    }
    return NewTokens(header["number"], tokens, tuple(header["seconds"]))


def _pack(header: dict[str, Any], x: Tensor | None) -> Tensor:
    text = json.dumps(header, separators=(",", ":")).encode()
    begin = -(-(_LENGTH_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT
    message = torch.zeros(begin + (0 if x is None else x.nbytes), dtype=torch.uint8)
    raw = memoryview(message.numpy().data)
    raw[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")
    raw[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = text
    if x is not None:
        message[begin:].view(x.dtype).copy_(x.reshape(-1))
    return message


def _unpack(message: Tensor) -> tuple[dict[str, Any], Tensor]:
    raw = memoryview(message.numpy().data)
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(bytes(raw[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    return header, message[-(-(_LENGTH_BYTES + length) // ALIGNMENT) * ALIGNMENT :]
