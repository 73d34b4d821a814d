"""What stages send each other: a header of small numbers and, behind it, rows of activations as they lie in memory.

    u32   bytes before the rows, a multiple of ALIGNMENT            all little-endian
    u8    1: a micro-batch, 2: new tokens
    u8    dtype of the rows: its place in DTYPES
    u8    dims of the rows
    u8    stages that have computed so far
    u32   number of the micro-batch
    u16   segments, or new tokens
    u16   rows whose token is wanted
    u32   bytes of JSON
    u32   each dim of the rows
    f32   seconds that each stage has computed
    u32   of each segment: slot, start, length; of each new token: slot, id
    u32   of each row that is wanted: slot, row
    JSON  what is rare: of a micro-batch which sequences take a slot, of tokens probabilities and failures

A message comes when the processor's caches have just been used for something else. Then every line of Python and every
call of PyTorch takes ten times as long as usual, so there are few of both here: as JSON and tensors a message took half
a millisecond.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolcluster.models.decoder import Segment
from smolcluster.serving.executor import MicroBatch, NewTokens, Opened
from smolcluster.serving.sampling import Sampled, Sampling
from smolcluster.transport.tensors import raw_bytes

ALIGNMENT = 64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
_HEAD = struct.Struct("<IBBBBIHHI")
_BATCH, _TOKENS = 1, 2
# numpy has no bfloat16; where it knows a dtype, it takes less than PyTorch's views.
_NUMPYS = {torch.float64: np.float64, torch.float32: np.float32, torch.int64: np.int64}
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def pack_batch(batch: MicroBatch, x: Tensor, seconds: Sequence[float] = ()) -> list[bytes | memoryview]:
    """A micro-batch for the next stage, in parts that belong behind each other.

    Args:
        batch: as it came.
        x: ids (N,), or what the layers so far have given (N, D); not to be changed before the message is sent.
        seconds: that the stages so far have computed.
    """
    rare = b""
    if batch.opened:
        opened = [
            [slot, asdict(each.sampling), each.context if each.needs_context else [], each.drawn]
            for slot, each in batch.opened.items()
        ]
        rare = json.dumps(opened, separators=(",", ":")).encode()
    numbers = [number for segment in batch.segments for number in segment]
    for pair in batch.wanted:
        numbers += pair
    counts = len(batch.segments), len(batch.wanted)
    head = _pack(
        (_BATCH, _CODES[x.dtype], x.dim(), len(seconds), batch.number, *counts), x.shape, seconds, numbers, rare
    )
    x = x.contiguous()
    array: Any = x.numpy() if x.dtype in _NUMPYS else None  # whose stubs do not say that it is a buffer
    return [head, raw_bytes(x) if x.dtype not in _NUMPYS else memoryview(array).cast("B")]


def unpack_batch(message: memoryview) -> tuple[MicroBatch, Tensor, Sequence[float]]:
    """What `pack_batch` has packed, without the tokens; the rows share the message's memory."""
    (begin, _, code, dims, stages, number, segments, wanted, _), values, rare = _unpack(message, 3)
    shape, seconds, rest = values[:dims], values[dims : dims + stages], values[dims + stages :]
    batch = MicroBatch(
        number,
        [Segment(*rest[at : at + 3]) for at in range(0, 3 * segments, 3)],
        (),
        [(rest[at], rest[at + 1]) for at in range(3 * segments, 3 * segments + 2 * wanted, 2)],
        {
            slot: Opened(Sampling(**sampling), tuple(context), drawn)
            for slot, sampling, context, drawn in (json.loads(rare) if rare else ())
        },
    )
    if (dtype := _NUMPYS.get(DTYPES[code])) is not None:
        return batch, torch.from_numpy(np.ndarray(shape, dtype, message, begin)), seconds
    return batch, torch.frombuffer(message, dtype=DTYPES[code], offset=begin).view(shape), seconds


def pack_tokens(found: NewTokens) -> list[bytes | memoryview]:
    """New tokens for the engine."""
    numbers: list[int] = []
    rare: dict[int, tuple[object, ...]] = {}
    for slot, each in found.tokens.items():
        if each.failure is not None or each.logprob is not None:
            rare[slot] = each.logprob, each.top, each.failure
        numbers += slot, max(each.token, 0)
    text = json.dumps(rare, separators=(",", ":")).encode() if rare else b""
    counts = _TOKENS, 0, 0, len(found.seconds), found.number, len(found.tokens), 0
    return [_pack(counts, (), found.seconds, numbers, text)]


def unpack_tokens(message: memoryview) -> NewTokens:
    """What `pack_tokens` has packed."""
    (_, _, _, _, stages, number, count, _, _), values, text = _unpack(message, 2)
    tokens = {values[at]: Sampled(values[at + 1]) for at in range(stages, stages + 2 * count, 2)}
    for slot, (logprob, top, failure) in (json.loads(text) if text else {}).items():
        token = tokens[int(slot)].token if failure is None else -1
        likeliest = tuple((int(each), float(value)) for each, value in top)
        tokens[int(slot)] = Sampled(token, logprob, likeliest, failure)
    return NewTokens(number, tokens, tuple(values[:stages]))


def _pack(
    counts: tuple[int, ...], dims: Sequence[int], seconds: Sequence[float], numbers: Sequence[int], rare: bytes
) -> bytes:
    body = struct.pack(f"<{len(dims)}I{len(seconds)}f{len(numbers)}I", *dims, *seconds, *numbers)
    length = _HEAD.size + len(body) + len(rare)
    begin = -(-length // ALIGNMENT) * ALIGNMENT
    return b"".join((_HEAD.pack(begin, *counts, len(rare)), body, rare, bytes(begin - length)))


def _unpack(message: memoryview, each: int) -> tuple[tuple[int, ...], tuple[Any, ...], bytes]:
    """The head, all numbers behind it, and JSON; `each`: numbers of a segment or a token."""
    head = _HEAD.unpack_from(message)
    _, _, _, dims, stages, _, segments, wanted, length = head
    layout = f"<{dims}I{stages}f{each * segments + 2 * wanted}I"
    values = struct.unpack_from(layout, message, _HEAD.size)
    at = _HEAD.size + struct.calcsize(layout)
    return head, values, bytes(message[at : at + length])
