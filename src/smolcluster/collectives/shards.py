"""Parameters in flat buckets of which every rank owns an equal part: the layout that all ZeRO stages share.

A bucket holds parameters of one unit (a block of the model), one behind the other, padded with zeros to a multiple of
the number of ranks. Rank r owns elements [r * part, (r + 1) * part). So parts are equal whatever the shapes, a
reduce-scatter leaves each rank the gradient of its own part, and an all-gather puts the bucket together again.

    unit blocks.0     | qkv.weight              | up.weight | up.bias, norm.weight, ... 000 |   three buckets
    owned by rank     | 0   | 1     | 2         | 0 | 1 | 2 | 0       | 1       | 2         |   of 3 ranks

A table is a matrix that shall be whole nowhere, such as a large embedding. Rank r owns rows [r * Q, (r + 1) * Q) of it,
and it travels in stripes: of every rank's rows the next few. Other buckets are one stripe.

    table             | a a b b c       | a a b b c       | a a b b 0       |   stripes a, b, c: each is a unit
    owned by rank     | 0               | 1               | 2               |

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5; Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277,
section 3.2.1 (flat parameters).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Parameters of fewer elements than this go together, as the last bucket of their unit: norms and biases are spread
# over a block, and one that is computed last would hold up a bucket that is otherwise full.
SMALL_ELEMENTS = 16 * 1024


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter's place: `numel` elements from `offset` on of its bucket."""

    index: int
    offset: int
    numel: int
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class Bucket:
    """The layout of one bucket.

    Attributes:
        unit: the number of the unit that its parameters belong to.
        dtype: of the parameters.
        trained: whether they have gradients; a bucket holds one kind.
        halved: whether a forward pass under autocast casts them, so that they may travel and be kept in its dtype.
        places: its parameters.
        used: elements without the padding.
        part: elements that a rank owns; `world_size * part` is the length.
        strip: elements of a rank's part that travel at once.
        is_table: whether it holds a table, which nobody has whole; its stripes are units from `unit` on.
    """

    unit: int
    dtype: torch.dtype
    trained: bool
    halved: bool
    places: tuple[Placed, ...]
    used: int
    part: int
    strip: int
    is_table: bool = False


@dataclass(frozen=True, slots=True)
class Stripe:
    """What travels at once: of every rank's part of a bucket the `length` elements from `start` on.

    Attributes:
        unit: the number of the unit that it is gathered with.
        bucket: number of the bucket.
        start: where it begins in each part.
        length: elements of each part.
    """

    unit: int
    bucket: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Described:
    """What the layout needs to know of a parameter, which may be on the meta device.

    `strip_rows`: of a table, the rows of each rank that travel at once; 0: it is none. A table's unit is its first.
    """

    unit: int
    shape: torch.Size
    dtype: torch.dtype
    trained: bool = True
    halved: bool = False
    strip_rows: int = 0


def plan_shards(params: Sequence[Described], bucket_bytes: int, world_size: int) -> list[Bucket]:
    """Which parameters share a bucket, in the order in which backward completes them: from the last to the first.

    Tables come first, wherever they are in the model: it ends with a projection. Within a unit large parameters come
    first and small ones (SMALL_ELEMENTS) together at the end. The same on every rank, as it depends on the arguments
    only.

    Args:
        params: in the model's order.
        bucket_bytes: no bucket holds more, unless one parameter does.
        world_size: ranks that each own a part.
    """
    backwards = range(len(params) - 1, -1, -1)
    buckets = [_bucket(params, [index], world_size) for index in backwards if params[index].strip_rows]
    plain = [index for index in backwards if not params[index].strip_rows]
    for _, run in itertools.groupby(plain, key=lambda index: params[index].unit):
        order = sorted(run, key=lambda index: params[index].shape.numel() < SMALL_ELEMENTS)
        buckets += _fill(params, order, bucket_bytes, world_size)
    return buckets


def divide_table(rows: int, row_bytes: int, stripe_bytes: int, world_size: int) -> tuple[int, int]:
    """Into how many stripes a table falls, and how many rows of each rank's part are in each; in the last perhaps less.

    Args:
        rows: of the table.
        row_bytes: of one row.
        stripe_bytes: no stripe has more, unless a row of each rank has.
        world_size: ranks that each own a part.
    """
    own = -(-rows // world_size)
    stripes = -(-own // max(1, stripe_bytes // (row_bytes * world_size)))
    strip_rows = -(-own // stripes)
    return -(-own // strip_rows), strip_rows


def stripes_of(buckets: Sequence[Bucket]) -> list[Stripe]:
    """What travels at once, in the order in which backward completes it: of a table the last stripe first."""
    stripes = []
    for number, bucket in enumerate(buckets):
        starts = range(0, bucket.part, bucket.strip)
        for unit, start in reversed(list(enumerate(starts, bucket.unit))):
            stripes.append(Stripe(unit, number, start, min(bucket.strip, bucket.part - start)))
    return stripes


def _fill(params: Sequence[Described], order: Sequence[int], bucket_bytes: int, world_size: int) -> list[Bucket]:
    filled: list[list[int]] = []
    open_buckets: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index in order:
        param = params[index]
        is_small = param.shape.numel() < SMALL_ELEMENTS
        key = (param.dtype, param.trained, param.halved, is_small)
        nbytes = param.shape.numel() * param.dtype.itemsize
        bucket, used = open_buckets.get(key, ([], 0))
        if not bucket or used + nbytes > bucket_bytes:
            bucket, used = [], 0
            filled.append(bucket)
        bucket.append(index)
        open_buckets[key] = (bucket, used + nbytes)
    return [_bucket(params, indices, world_size) for indices in filled]


def _bucket(params: Sequence[Described], indices: Sequence[int], world_size: int) -> Bucket:
    places, offset = [], 0
    for index in indices:
        shape = params[index].shape
        places.append(Placed(index, offset, shape.numel(), shape))
        offset += shape.numel()
    first = params[indices[0]]
    if first.strip_rows:
        rows, width = first.shape
        part, strip = -(-rows // world_size) * width, first.strip_rows * width
    else:
        part = strip = max(1, -(-offset // world_size))
    is_table = first.strip_rows > 0
    return Bucket(first.unit, first.dtype, first.trained, first.halved, tuple(places), offset, part, strip, is_table)


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank owns of a parameter: `param` holds its flattened elements from `offset` on.

    Attributes:
        index: the parameter's.
        bucket: number of the bucket.
        start: where the piece begins in the rank's part of the bucket.
        offset: where it begins in the flattened parameter.
        param: what the optimizer steps: the elements, sharing memory with the rank's part.
    """

    index: int
    bucket: int
    start: int
    offset: int
    param: nn.Parameter

    def of(self, part: Tensor) -> Tensor:
        """The same elements of another tensor that is laid out as the rank's part of the bucket."""
        return part[self.start : self.start + self.param.numel()].view(self.param.shape)


def pieces_of(bucket: Bucket, number: int, own: Tensor, first: int) -> list[Piece]:
    """The pieces of a bucket's parameters that lie in `own`, which holds its elements from `first` on."""
    pieces = []
    for place in bucket.places:
        start, end = max(place.offset, first), min(place.offset + place.numel, first + own.numel())
        if start < end:
            values = own[start - first : end - first]
            # Optimizers may look at the shape: weight decay for matrices only, say. A piece has at least as many dims.
            is_whole = end - start == place.numel
            values = values.view(place.shape if is_whole else (-1, *[1] * (len(place.shape) - 1)))
            param = nn.Parameter(values, requires_grad=bucket.trained)
            pieces.append(Piece(place.index, number, start - first, start - place.offset, param))
    return pieces


def views_of(bucket: Bucket, whole: Tensor) -> dict[int, Tensor]:
    """Each parameter of a bucket by its index, in its shape, as a view of the flat tensor."""
    return {place.index: whole[place.offset : place.offset + place.numel].view(place.shape) for place in bucket.places}
