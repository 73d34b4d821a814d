"""The prelude: what is packed comes back, and whatever else arrives is refused before anything is allocated."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcluster.errors import FrameError
from smolcluster.transport import frame
from smolcluster.transport.frame import DTYPES, KIND_COLLECTIVE, KIND_MESSAGE, PRELUDE_BYTES, Prelude
from smolcluster.transport.tensors import empty_for

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
LIMIT = 1 << 30

MESSAGE = Prelude(KIND_MESSAGE, 0, 0, DTYPES["float32"][0], 0, 1, 7, 0, 0, 6, 24, ndim=2)
COLLECTIVE = Prelude(KIND_COLLECTIVE, frame.OP_ALL_REDUCE, 1, DTYPES["float64"][0], 0, 1, 3, 2, 9, 1000, 80)


@st.composite
def preludes(draw: st.DrawFn) -> Prelude:
    """Every prelude that may be sent."""
    message = draw(st.booleans())
    return Prelude(
        kind=KIND_MESSAGE if message else KIND_COLLECTIVE,
        operation=frame.OP_NONE if message else draw(st.integers(1, 8)),
        reduce=0 if message else draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(sorted(frame.DTYPE_NAMES))),
        codec=0 if message else draw(st.sampled_from(sorted(frame.CODEC_NAMES))),
        generation=draw(U32),
        tag=draw(U32),
        hop=draw(U32),
        sequence=draw(U64),
        count=draw(U64),
        nbytes=draw(U64),
    )


@given(preludes(), st.lists(U64, max_size=8))
def test_a_prelude_survives_the_wire(prelude: Prelude, dims: list[int]) -> None:
    packed = frame.pack(prelude, tuple(dims))

    assert len(packed) == PRELUDE_BYTES + 8 * len(dims)
    assert frame.unpack(packed[:PRELUDE_BYTES]) == prelude._replace(ndim=len(dims))
    assert struct.unpack(f"!{len(dims)}Q", packed[PRELUDE_BYTES:]) == tuple(dims)


def test_the_layout_is_the_documented_one() -> None:
    packed = frame.pack(Prelude(1, 2, 3, 4, 1, 0x05060708, 9, 10, 11, 12, 13), (14,))
    assert packed.hex(" ", 4) == (
        "53460102 03040101 05060708 00000009 0000000a 00000000 00000000 0000000b 00000000 0000000c 00000000 0000000d "
        "00000000 0000000e"
    )


@pytest.mark.parametrize("good", [MESSAGE, COLLECTIVE], ids=["message", "collective"])
@pytest.mark.parametrize(
    ("offset", "allowed"),
    [
        (0, {0x53}),
        (1, {0x46}),
        (2, {KIND_COLLECTIVE, KIND_MESSAGE}),
        (3, set(frame.OP_NAMES)),
        (4, {0, 1, 2, 3}),
        (5, set(frame.DTYPE_NAMES)),
        (6, set(frame.CODEC_NAMES)),
        (7, set(range(9))),
    ],
    ids=["magic", "magic 2", "kind", "operation", "reduce", "dtype", "codec", "ndim"],
)
def test_every_value_that_the_protocol_does_not_know_is_refused(good: Prelude, offset: int, allowed: set[int]) -> None:
    packed = bytearray(frame.pack(good, (2, 3) if good is MESSAGE else ()))
    for value in set(range(256)) - allowed:
        packed[offset] = value
        with pytest.raises(FrameError):
            frame.unpack(packed[:PRELUDE_BYTES])


@pytest.mark.parametrize(
    "strange",
    [
        MESSAGE._replace(operation=frame.OP_ALL_REDUCE),
        MESSAGE._replace(reduce=1),
        MESSAGE._replace(codec=1),
        COLLECTIVE._replace(operation=frame.OP_NONE),
    ],
    ids=["a message with an operation", "a message that is reduced", "an encoded message", "a collective without"],
)
def test_fields_that_contradict_the_kind_are_refused(strange: Prelude) -> None:
    with pytest.raises(FrameError):
        frame.unpack(frame.pack(strange))


@settings(max_examples=2000)
@given(st.binary(min_size=PRELUDE_BYTES, max_size=PRELUDE_BYTES), st.binary(min_size=64, max_size=64), st.booleans())
def test_random_bytes_only_ever_raise_frame_error(head: bytes, dims: bytes, plausible: bool) -> None:
    if plausible:  # otherwise the magic hides everything behind it
        limits = (3, 10, 5, 12, 5, 10)
        head = b"SF" + bytes(value % limit for value, limit in zip(head[2:8], limits, strict=True)) + head[8:]
    try:
        prelude = frame.unpack(head)
        shape = frame.unpack_dims(dims[: 8 * prelude.ndim], prelude, LIMIT)
    except FrameError:
        return
    assert empty_for(prelude, shape).nbytes == prelude.nbytes <= LIMIT


# Zero makes every product zero, so that strange shapes are not caught by the byte count.
@settings(max_examples=500)
@given(st.lists(st.one_of(st.sampled_from([0, 1, 2, 2**31, 2**62, 2**63, 2**64 - 1]), U64), max_size=8))
def test_dims_either_become_a_tensor_or_a_frame_error(dims: list[int]) -> None:
    count = math.prod(dims)
    if count * 4 >= 2**64:
        return  # cannot be said in a prelude
    prelude = MESSAGE._replace(count=count, nbytes=count * 4, ndim=len(dims))
    try:
        shape = frame.unpack_dims(struct.pack(f"!{len(dims)}Q", *dims), prelude, 1 << 20)
    except FrameError:
        return
    assert tuple(empty_for(prelude, shape).shape) == tuple(dims)


@pytest.mark.parametrize(
    ("dims", "count", "nbytes"),
    [
        ((2, 3), 6, 20),
        ((2, 3), 5, 24),
        ((2, 3), 5, 20),
        ((2, 3), 6, 0),
        ((), 0, 0),
        ((0,), 1, 4),
        ((2**32, 2**32), 0, 0),  # overflows 64 bits to zero
        ((2**33, 2**33, 2**33), 6, 24),
    ],
)
def test_dims_count_and_bytes_that_disagree_are_refused(dims: tuple[int, ...], count: int, nbytes: int) -> None:
    prelude = MESSAGE._replace(count=count, nbytes=nbytes, ndim=len(dims))
    with pytest.raises(FrameError, match=r"says \d+ elements and \d+ bytes"):
        frame.unpack_dims(struct.pack(f"!{len(dims)}Q", *dims), prelude, LIMIT)


@pytest.mark.parametrize(
    ("dims", "limit"),
    [((2, 3), 23), ((2**31,), LIMIT), ((2**40, 1), LIMIT), ((2**20, 0, 2**20), LIMIT), ((2**64 - 1, 0), LIMIT)],
)
def test_a_tensor_that_is_too_large_is_refused_before_memory_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, dims: tuple[int, ...], limit: int
) -> None:
    def no_memory(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(torch, "empty", no_memory)
    count = math.prod(dims)
    prelude = MESSAGE._replace(count=count, nbytes=4 * count, ndim=len(dims))
    with pytest.raises(FrameError):
        frame.unpack_dims(struct.pack(f"!{len(dims)}Q", *dims), prelude, limit)


def test_the_limit_itself_is_allowed() -> None:
    assert frame.unpack_dims(struct.pack("!2Q", 2, 3), MESSAGE, 24) == (2, 3)


def test_the_codes_are_those_of_the_protocol_page() -> None:
    names = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"]
    assert {name: code for name, (code, _) in DTYPES.items()} == {name: n for n, name in enumerate(names, 1)}
    assert frame.CODECS == {"none": 0, "bf16": 1, "fp16": 2, "int8": 3}
    operations = "all_reduce reduce_scatter all_gather broadcast all_to_all all_to_all_ragged exchange barrier"
    assert [frame.OP_NAMES[code] for code in range(1, 9)] == operations.split()


def test_a_prelude_describes_itself_in_words() -> None:
    assert COLLECTIVE.describe() == "all_reduce sum of 1000 float64 (call 9)"
    assert COLLECTIVE._replace(codec=1, reduce=2).describe() == "all_reduce avg of 1000 float64 as bf16 (call 9)"
    assert MESSAGE.describe() == "message tag=7 float32 x 6"
