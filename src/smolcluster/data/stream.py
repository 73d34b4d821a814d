"""Training data larger than memory: the same stream of samples on every rank, of which each keeps its part.

Idea      A source has units that can be read in any order (data/rows.py). An epoch reads them in an order drawn from
          (seed, epoch). Consecutive rows are put together to *groups* of about 1 MiB of text; a group's windows are
          shuffled, by (seed, epoch, where it begins). Step after step takes the next `global_batch` windows, the last
          step of an epoch what is left. All of this depends on data, seed and global batch only, so every rank does it
          alike: it knows without a message what a step holds over all ranks, and makes tensors of its own part alone.
Cost      Every rank reads and tokenises all of the data, also one that looks at nothing of it: where an epoch ends, and
          what a step holds then, comes out of that. Memory: one group and the prefetched steps.
Resume    A place in the stream is (epoch, unit, row, window): the group that begins at that row is made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from smolcluster.data.batch import Batch, Reads, read_only, unread
from smolcluster.data.datasets import WindowsDataset
from smolcluster.data.documents import count_windows, first_windows, is_held_out, windows_of
from smolcluster.data.loader import Step
from smolcluster.data.rows import RowSource
from smolcluster.data.sampler import micro_ranges, seeded_permutation
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import CheckpointError, DataError
from smolcluster.kinds import JsonObject

logger = logging.getLogger(__name__)

# Characters. Larger groups shuffle better, and it is all that a rank holds of the data.
GROUP_CHARS = 2**20
# Without files to validate on: windows that are held out, taken from so many places spread evenly over the data.
HELD_OUT_WINDOWS = 256
HELD_OUT_PLACES = 16
MAX_VALIDATION_WINDOWS = 1000  # of files to validate on, which are in memory

Row = tuple[int, int]  # unit, and row in it


@dataclass(frozen=True, slots=True)
class Place:
    """Between two samples of the stream.

    Attributes:
        step: steps that were taken before.
        epoch: passes that were completed before.
        turn: which unit of the epoch's order the group begins in.
        row: the row of that unit that it begins with.
        window: how many of the group's windows were taken.
        units: units of the data. A place in other data means nothing.
        nbytes: bytes of the data.
    """

    step: int
    epoch: int
    turn: int
    row: int
    window: int
    units: int
    nbytes: int

    def to_json(self) -> JsonObject:
        """As it is kept in a checkpoint."""
        return {**asdict(self)}


class Group(NamedTuple):
    """Consecutive rows of the stream: where they begin, and their windows."""

    turn: int
    row: int
    windows: WindowsDataset


Segment = tuple[WindowsDataset, Tensor]  # samples of one group: (n,) indices


class TextStream:
    """A source as groups of windows. Nothing is kept between calls."""

    def __init__(self, source: RowSource, tokenizer: Tokenizer, max_seq_len: int, held_out: Iterable[Row] = ()) -> None:
        """Describe it; nothing is read yet.

        Args:
            source: the rows. Those without text give no sample.
            tokenizer: makes tokens of them.
            max_seq_len: tokens of a window.
            held_out: rows that are never trained on.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self._held_out = frozenset(held_out)

    def start(self) -> Place:
        """Before the first sample."""
        return Place(0, 0, 0, 0, 0, len(self.source), self.source.nbytes)

    def place(self, position: JsonObject) -> Place:
        """A place out of a checkpoint.

        Raises:
            CheckpointError: it is none, or one of other data.
        """
        numbers = [value for value in position.values() if type(value) is int and value >= 0]
        if set(position) != {field.name for field in fields(Place)} or len(numbers) != len(position):
            raise CheckpointError(
                f"the checkpoint's data position {position} is no place in streamed data. Resume with the data.dataset "
                "and data.streaming of the run that wrote it"
            )
        place = Place(**dict(zip(position, numbers, strict=True)))
        if (place.units, place.nbytes) != (len(self.source), self.source.nbytes):
            raise CheckpointError(
                f"dataset {self.source.name} has {self.source.nbytes} bytes in {len(self.source)} parts, but the "
                f"checkpoint was written with {place.nbytes} bytes in {place.units}. Resume with the same data"
            )
        return place

    def groups(self, order: Sequence[int] | Tensor, turn: int = 0, row: int = 0) -> Iterator[Group]:
        """The groups of units in a given order, from a group that begins at row `row` of the `turn`-th one."""
        texts: list[str] = []
        chars, begin = 0, (turn, row)
        for here in range(turn, len(order)):
            unit = int(order[here])
            first = row if here == turn else 0
            for number, text in enumerate(self.source.rows(unit, first), first):
                if not text.strip() or (unit, number) in self._held_out:
                    continue
                texts.append(text)
                chars += len(text)
                if chars >= GROUP_CHARS:
                    yield Group(*begin, windows_of(self.source.name, texts, self.tokenizer, self.max_seq_len))
                    texts, chars, begin = [], 0, (here, number + 1)
        if texts:
            yield Group(*begin, windows_of(self.source.name, texts, self.tokenizer, self.max_seq_len))

    def count_samples(self) -> int:
        """Samples of an epoch; blocks while all of the data is read and tokenised once."""
        started = time.monotonic()
        logger.info("counting dataset=%s bytes=%d", self.source.name, self.source.nbytes)
        samples = sum(len(group.windows) for group in self.groups(range(len(self.source))))
        logger.info("counted dataset=%s samples=%d seconds=%.1f", self.source.name, samples, time.monotonic() - started)
        return samples


def hold_out(source: RowSource, tokenizer: Tokenizer, max_seq_len: int) -> tuple[WindowsDataset, set[Row]]:
    """Rows for validation where there are no files for it: one in ten, at places spread evenly over the data; blocks.

    Returns:
        Their windows, about HELD_OUT_WINDOWS at most, and the rows, to be left out of the stream.

    Raises:
        DataError: a row cannot be read.
    """
    places = min(len(source), HELD_OUT_PLACES)
    texts: list[str] = []
    rows: set[Row] = set()
    number = 0
    for unit in (place * len(source) // places for place in range(places)):
        missing = -(-HELD_OUT_WINDOWS // places)
        for row, text in enumerate(source.rows(unit)):
            if missing <= 0:
                break
            if not text.strip():
                continue
            if is_held_out(number):
                texts.append(text)
                rows.add((unit, row))
                missing -= count_windows(text, tokenizer, max_seq_len)
            number += 1
    return first_windows(source.name, texts, tokenizer, max_seq_len, MAX_VALIDATION_WINDOWS), rows


def streamed_steps(
    stream: TextStream,
    global_batch: int,
    seed: int,
    weights: Sequence[float],
    rank: int,
    micro_batches: int = 1,
    start: Place | None = None,
    max_steps: int | None = None,
    *,
    micro_first: bool = False,
    reads: Reads = "all",
) -> Iterator[Step]:
    """The steps of one rank.

    Args:
        stream: where samples come from.
        global_batch: samples of one step over all ranks.
        seed: the run's seed.
        weights: the ranks' relative shares, in rank order.
        rank: whose part.
        micro_batches: parts that a step's samples are split into, as equal as they can be; the same number always.
        start: where to go on; None: at the beginning.
        max_steps: number of steps of the whole run. None: without end.
        micro_first: see `micro_ranges`.
        reads: what of its samples the rank looks at.

    Raises:
        DataError: a row cannot be read, or there is nothing to train on.
    """
    place = start or stream.start()
    for segments, after in islice(
        _places(stream, global_batch, seed, place), None if max_steps is None else max(0, max_steps - place.step)
    ):
        planned = sum(windows.targets_per_sample(indices) for windows, indices in segments)
        total = sum(len(indices) for _, indices in segments)
        parts = micro_ranges(total, weights, rank, micro_batches, micro_first=micro_first)
        if reads == "nothing":
            yield [unread(len(part)) for part in parts], after.to_json()
            continue
        batches = [read_only(_batch(_cut(segments, part.start, part.stop), planned), reads) for part in parts]
        yield batches, after.to_json()


def _places(stream: TextStream, global_batch: int, seed: int, start: Place) -> Iterator[tuple[list[Segment], Place]]:
    """The samples of each step over all ranks, and the place behind it, without end."""
    place = start
    for epoch in count(place.epoch):
        before = place
        for segments, place in _epoch(stream, global_batch, seed, before):
            yield segments, place
        if place is before and before.window == 0:
            raise DataError(
                f"dataset {stream.source.name} has no text to train on: no row, or only empty ones. Choose other data"
            )
        place = replace(place, epoch=epoch + 1, turn=0, row=0, window=0)


def _epoch(stream: TextStream, global_batch: int, seed: int, start: Place) -> Iterator[tuple[list[Segment], Place]]:
    """The same for what is left of an epoch."""
    order = seeded_permutation(len(stream.source), seed, start.epoch)
    segments: list[Segment] = []
    missing, step, taken = global_batch, start.step, start.window
    for group in stream.groups(order, start.turn, start.row):
        shuffled = seeded_permutation(len(group.windows), seed, start.epoch, group.turn, group.row)
        while taken < len(shuffled):
            indices = shuffled[taken : taken + missing]
            segments.append((group.windows, indices))
            taken += len(indices)
            missing -= len(indices)
            if missing == 0:
                step += 1
                yield segments, replace(start, step=step, turn=group.turn, row=group.row, window=taken)
                segments, missing = [], global_batch
        taken = 0
    if segments:
        yield segments, replace(start, step=step + 1, epoch=start.epoch + 1, turn=0, row=0, window=0)


def _cut(segments: list[Segment], begin: int, end: int) -> list[Segment]:
    """Samples `begin` to `end` of a step; at least one segment, perhaps an empty one, so that shapes are known."""
    cut = []
    for windows, indices in segments:
        piece = indices[max(0, begin) : max(0, end)]
        if len(piece):
            cut.append((windows, piece))
        begin, end = begin - len(indices), end - len(indices)
    return cut or [(segments[0][0], segments[0][1][:0])]


def _batch(segments: list[Segment], planned_count: int) -> Batch:
    batches = [windows.batch(indices) for windows, indices in segments]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Batch(inputs, targets, planned_count=planned_count)
