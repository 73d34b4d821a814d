"""What stages send each other: a header of small numbers and, behind it, rows of activations as they lie in memory.

    u32   bytes before the rows, a multiple of 8            all little-endian
    u8    1: a micro-batch, 2: new tokens
    u8    dtype of the rows: its place in DTYPES
    u8    stages that have computed so far
    u8    0
    u32   numbers in a row; 0: a row is one number, a token's id
    u32   number of the micro-batch
    u16   segments, or new tokens
    u16   rows whose token is wanted
    u32   bytes of JSON
    f32   seconds that each stage has computed
    u32   of each segment: slot, start, length; of each new token: slot, id
    u32   of each row that is wanted: slot, row
    JSON  what is rare: of a micro-batch which sequences take a slot, of tokens probabilities and failures

A message comes when the processor's caches have just been used for something else. Then every line of Python and every
call of PyTorch takes ten times as long as usual, so there are few of both here, and the header is made before the rows
are computed: as JSON and tensors a message took half a millisecond.
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

from smolcluster.errors import FrameError
from smolcluster.models.decoder import Segment
from smolcluster.serving.executor import MicroBatch, NewTokens, Opened
from smolcluster.serving.sampling import Sampled, Sampling
from smolcluster.transport.tensors import raw_bytes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
_ALIGNMENT = 8
_HEAD = struct.Struct("<IBBBxIIHHI")
_DTYPE_AT, _WIDTH_AT = 5, 8
_BATCH, _TOKENS = 1, 2
# numpy has no bfloat16; where it knows a dtype, it takes less than PyTorch's views.
_NUMPYS = {torch.float64: np.float64, torch.float32: np.float32, torch.int64: np.int64}
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class BatchMessage:
    """A micro-batch for the next stage: its header, which the rows follow."""

    def __init__(self, batch: MicroBatch, seconds: Sequence[float] = (), *, computes: bool = True) -> None:
        """Make the header.

        Args:
            batch: as it came.
            seconds: that the stages before this one have computed.
            computes: this one does, too.
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
        self._seconds_at = _HEAD.size + 4 * len(seconds) if computes else None
        all_seconds = (*seconds, 0.0) if computes else seconds
        self._head = _pack(_BATCH, all_seconds, batch.number, (len(batch.segments), len(batch.wanted)), numbers, rare)

    def parts(self, x: Tensor, seconds: float = 0.0) -> list[bytes | bytearray | memoryview]:
        """The message, in parts that belong behind each other; once.

        Args:
            x: ids (N,), or what the layers so far have given (N, D); not to be changed before the message is sent.
            seconds: that this stage has computed.
        """
        head = self._head
        head[_DTYPE_AT] = _CODES[x.dtype]
        struct.pack_into("<I", head, _WIDTH_AT, x.shape[1] if x.dim() == 2 else 0)
        if self._seconds_at is not None:
            struct.pack_into("<f", head, self._seconds_at, seconds)
        x = x.contiguous()
        if x.dtype not in _NUMPYS:
            return [head, raw_bytes(x)]
        array: Any = x.numpy()  # whose stubs do not say that it is a buffer
        return [head, memoryview(array).cast("B")]


def unpack_batch(message: memoryview) -> tuple[MicroBatch, Tensor, Sequence[float]]:
    """What a BatchMessage holds, without the tokens; the rows (N, D), or ids (N,), share the message's memory.

    Raises:
        FrameError: it is something else.
    """
    try:
        (begin, _, code, stages, width, number, segments, wanted, _), values, rare = _unpack(message, _BATCH, 3)
        seconds, rest = values[:stages], values[stages:]
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
        rows = sum(segment.length for segment in batch.segments)
        shape = (rows, width) if width else (rows,)
        if begin % _ALIGNMENT or begin + rows * (width or 1) * DTYPES[code].itemsize != len(message):
            raise ValueError(f"{len(message)} bytes, of which {begin} are not rows")
        if (dtype := _NUMPYS.get(DTYPES[code])) is not None:
            return batch, torch.from_numpy(np.ndarray(shape, dtype, message, begin)), seconds
        return batch, torch.frombuffer(message, dtype=DTYPES[code], offset=begin).view(shape), seconds
    except (struct.error, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise FrameError(f"a stage sent what is no micro-batch: {error}") from error


def pack_tokens(found: NewTokens) -> list[bytes | bytearray | memoryview]:
    """New tokens for the engine."""
    numbers: list[int] = []
    rare: dict[int, tuple[object, ...]] = {}
    for slot, each in found.tokens.items():
        if each.failure is not None or each.logprob is not None:
            rare[slot] = each.logprob, each.top, each.failure
        numbers += slot, max(each.token, 0)
    text = json.dumps(rare, separators=(",", ":")).encode() if rare else b""
    return [_pack(_TOKENS, found.seconds, found.number, (len(found.tokens), 0), numbers, text)]


def unpack_tokens(message: memoryview) -> NewTokens:
    """What `pack_tokens` has packed.

    Raises:
        FrameError: it is something else.
    """
    try:
        (_, _, _, stages, _, number, count, _, _), values, text = _unpack(message, _TOKENS, 2)
        tokens = {values[at]: Sampled(values[at + 1]) for at in range(stages, stages + 2 * count, 2)}
        for slot, (logprob, top, failure) in (json.loads(text) if text else {}).items():
            token = tokens[int(slot)].token if failure is None else -1
            likeliest = tuple((int(each), float(value)) for each, value in top)
            tokens[int(slot)] = Sampled(token, logprob, likeliest, failure)
        return NewTokens(number, tokens, tuple(values[:stages]))
    except (struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FrameError(f"a stage sent what are no tokens: {error}") from error


def _pack(
    kind: int, seconds: Sequence[float], number: int, counts: tuple[int, int], numbers: Sequence[int], rare: bytes
) -> bytearray:
    body = struct.pack(f"<{len(seconds)}f{len(numbers)}I", *seconds, *numbers)
    length = _HEAD.size + len(body) + len(rare)
    begin = -(-length // _ALIGNMENT) * _ALIGNMENT
    head = _HEAD.pack(begin, kind, 0, len(seconds), 0, number, *counts, len(rare))
    return bytearray().join((head, body, rare, bytes(begin - length)))


def _unpack(message: memoryview, kind: int, each: int) -> tuple[tuple[int, ...], tuple[Any, ...], bytes]:
    """The head, all numbers behind it, and JSON; `each`: numbers of a segment or a token."""
    head = _HEAD.unpack_from(message)
    _, found, _, stages, _, _, segments, wanted, length = head
    if found != kind:
        raise ValueError(f"it is of kind {found}, not {kind}")
    layout = f"<{stages}f{each * segments + 2 * wanted}I"
    values = struct.unpack_from(layout, message, _HEAD.size)
    at = _HEAD.size + struct.calcsize(layout)
    return head, values, bytes(message[at : at + length])
