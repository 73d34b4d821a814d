"""The prelude in front of every payload on a bulk lane: 48 bytes, big-endian, then the dims, then the raw payload.

offset  bytes  field
     0      2  magic 0x5346 ("SF")
     2      1  kind        1 collective, 2 point-to-point
     3      1  operation   which collective (OP_*), 0 for point-to-point
     4      1  reduce      1 sum, 2 avg, 3 max, 0 none
     5      1  dtype       of the tensor (dtype codes below)
     6      1  codec       0 none, 1 bf16, 2 fp16, 3 int8: what the payload bytes are
     7      1  ndim        number of dims that follow the prelude, at most 8
     8      4  generation  of the membership; frames of another one are refused
    12      4  tag         point-to-point: the tag; collective: the piece
    16      4  hop         collective: the position within the piece's exchange
    20      4  zero
    24      8  sequence    collective: number of the call on its communicator; point-to-point: 0
    32      8  count       elements of the whole call (collective) or of the message (point-to-point)
    40      8  nbytes      payload bytes that follow
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from smolcluster.errors import FrameError

MAGIC = 0x5346
KIND_COLLECTIVE, KIND_MESSAGE = 1, 2
MAX_DIMS = 8

OP_NONE, OP_ALL_REDUCE, OP_REDUCE_SCATTER, OP_ALL_GATHER, OP_BROADCAST = 0, 1, 2, 3, 4
OP_ALL_TO_ALL, OP_ALL_TO_ALL_RAGGED, OP_EXCHANGE, OP_BARRIER = 5, 6, 7, 8
OP_NAMES = {
    OP_NONE: "message",
    OP_ALL_REDUCE: "all_reduce",
    OP_REDUCE_SCATTER: "reduce_scatter",
    OP_ALL_GATHER: "all_gather",
    OP_BROADCAST: "broadcast",
    OP_ALL_TO_ALL: "all_to_all",
    OP_ALL_TO_ALL_RAGGED: "all_to_all_ragged",
    OP_EXCHANGE: "exchange",
    OP_BARRIER: "barrier",
}

# The largest tensor that is allocated because a frame says so.
MAX_UNSIZED_BYTES = 1 << 30
# Collectives whose frames carry a shape of their own (`count` is then that tensor's), and how large that may be.
SHAPED = {OP_ALL_TO_ALL_RAGGED: MAX_UNSIZED_BYTES, OP_EXCHANGE: 1 << 20, OP_BARRIER: 1 << 20}

# name -> (code, bytes per element). The only dtypes that travel.
DTYPES: dict[str, tuple[int, int]] = {
    "float32": (1, 4),
    "float64": (2, 8),
    "float16": (3, 2),
    "bfloat16": (4, 2),
    "int8": (5, 1),
    "uint8": (6, 1),
    "int16": (7, 2),
    "int32": (8, 4),
    "int64": (9, 8),
    "bool": (10, 1),
}
DTYPE_NAMES = {code: name for name, (code, _) in DTYPES.items()}
CODECS = {"none": 0, "bf16": 1, "fp16": 2, "int8": 3}
CODEC_NAMES = {code: name for name, code in CODECS.items()}

_PRELUDE = struct.Struct("!HBBBBBBIIIxxxxQQQ")
PRELUDE_BYTES = _PRELUDE.size
_BYTES = struct.Struct(_PRELUDE.format + "Q")


class Prelude(NamedTuple):
    """The fields of one frame. See the module docstring. (A frozen dataclass takes three times as long to make.)"""

    kind: int
    operation: int
    reduce: int
    dtype: int
    codec: int
    generation: int
    tag: int
    hop: int
    sequence: int
    count: int  # type: ignore[assignment]  # instead of tuple.count, which nobody needs here
    nbytes: int
    ndim: int = 0

    def is_of_call(self, call: Prelude) -> bool:
        """Whether this frame belongs to that collective: all equal but where it stands and how long it is."""
        return (
            self.sequence == call.sequence
            and self[:6] == call[:6]  # kind, operation, reduce, dtype, codec, generation
            # A frame with a shape of its own speaks of its own tensor only.
            and (self.operation in SHAPED or (self.count == call.count and self.ndim == 0))
        )

    def describe(self) -> str:
        """The call in words, for error messages."""
        if self.kind == KIND_MESSAGE:
            return f"message tag={self.tag} {DTYPE_NAMES[self.dtype]} x {self.count}"
        name = OP_NAMES[self.operation]
        reduce = {0: "", 1: " sum", 2: " avg", 3: " max"}[self.reduce]
        codec = f" as {CODEC_NAMES[self.codec]}" if self.codec else ""
        return f"{name}{reduce} of {self.count} {DTYPE_NAMES[self.dtype]}{codec} (call {self.sequence})"


def pack(prelude: Prelude, dims: tuple[int, ...] = ()) -> bytes:
    """Prelude and dims as bytes."""
    p = prelude
    head = _PRELUDE.pack(
        MAGIC, p.kind, p.operation, p.reduce, p.dtype, p.codec, len(dims),
        p.generation, p.tag, p.hop, p.sequence, p.count, p.nbytes,
    )  # fmt: skip
    return head + struct.pack(f"!{len(dims)}Q", *dims) if dims else head


def pack_bytes(dtype: int, generation: int, tag: int, count: int) -> bytes:
    """What `pack` gives for a message of one dim of `count` bytes, `dtype` being the code of uint8; in one call."""
    return _BYTES.pack(MAGIC, KIND_MESSAGE, OP_NONE, 0, dtype, 0, 1, generation, tag, 0, 0, count, count, count)


def unpack(data: bytes | bytearray | memoryview) -> Prelude:
    """Check and read the first PRELUDE_BYTES.

    Raises:
        FrameError: any field outside what the protocol knows.
    """
    magic, kind, operation, reduce, dtype, codec, ndim, generation, tag, hop, sequence, count, nbytes = _PRELUDE.unpack(
        data
    )
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic:#06x} instead of {MAGIC:#06x}: the stream is out of step")
    if kind not in (KIND_COLLECTIVE, KIND_MESSAGE) or operation not in OP_NAMES or reduce > 3:
        raise FrameError(f"unknown frame kind {kind}, operation {operation} or reduce {reduce}")
    if (operation == OP_NONE) != (kind == KIND_MESSAGE) or (kind == KIND_MESSAGE and (reduce or codec)):
        raise FrameError(f"a frame of kind {kind} with operation {operation}, reduce {reduce} and codec {codec}")
    if dtype not in DTYPE_NAMES or codec not in CODEC_NAMES:
        raise FrameError(f"unknown dtype {dtype} or codec {codec} in a frame")
    if ndim > MAX_DIMS:
        raise FrameError(f"a frame with {ndim} dims, at most {MAX_DIMS} are allowed")
    return Prelude(kind, operation, reduce, dtype, codec, generation, tag, hop, sequence, count, nbytes, ndim)


def unpack_dims(data: bytes | bytearray | memoryview, prelude: Prelude, limit_bytes: int) -> tuple[int, ...]:
    """Read the dims and check that they, `count` and `nbytes` agree and stay below `limit_bytes`.

    For frames that carry a whole tensor. Called before any memory is allocated for the payload.

    Raises:
        FrameError: they do not agree, or the tensor is too large.
    """
    dims: tuple[int, ...] = struct.unpack(f"!{prelude.ndim}Q", data)
    elements = math.prod(dims)  # Python's integers do not overflow
    itemsize = DTYPES[DTYPE_NAMES[prelude.dtype]][1]
    if elements != prelude.count or elements * itemsize != prelude.nbytes:
        raise FrameError(f"a frame of shape {dims} says {prelude.count} elements and {prelude.nbytes} bytes")
    # Strides are products of dims that may stand beside a zero: torch refuses those that overflow.
    if math.prod(max(dim, 1) for dim in dims) * itemsize > limit_bytes:
        raise FrameError(f"a frame of shape {dims} and {prelude.nbytes} bytes, at most {limit_bytes} are allowed here")
    return dims
