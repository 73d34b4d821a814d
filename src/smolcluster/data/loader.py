"""Batches of one rank: training batches made ahead by a thread of their own, evaluation batches on demand."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor

from smolcluster.data.batch import Batch, Reads, read_only, unread
from smolcluster.data.datasets import Dataset
from smolcluster.data.sampler import Sampler, micro_ranges, split_by_shares
from smolcluster.kinds import JsonObject
from smolcluster.telemetry import LOADER, Telemetry

logger = logging.getLogger(__name__)

# Steps ready ahead of the caller: two, or where steps are small so many as fit into PREFETCHED_BYTES. Loading is faster
# than a step, but where a step takes a millisecond, waking the thread for each would cost a tenth of it.
MIN_PREFETCHED_STEPS = 2
MAX_PREFETCHED_STEPS = 64
PREFETCHED_BYTES = 8 * 2**20
JOIN_TIMEOUT = 5.0
# A wait without an end cannot be interrupted by Ctrl-C on Windows.
WAIT_SLICE = 0.5


# One rank's micro-batches of a step, and the position behind it: what a run that goes on there has to be told.
Step: TypeAlias = "tuple[list[Batch], JsonObject]"


class BatchLoader:
    """Iterates over the steps of one rank: `next()` gives a step's micro-batches.

    A thread, started by the first `next()` or `with`, prepares the following steps while the caller computes.
    Close it (or use `with`); it also ends by itself after the last step. For one consuming thread.
    """

    def __init__(
        self,
        make_steps: Callable[[JsonObject, Sequence[float]], Iterable[Step]],
        weights: Sequence[float],
        start: JsonObject,
        rank: int,
        global_batch: int,
    ) -> None:
        """Describe the batches; nothing is loaded yet.

        Args:
            make_steps: from a position and the ranks' weights to the steps from there on (`sampled_steps` or
                `streamed_steps`), which are made on the loader's thread.
            weights: all ranks' relative shares, in rank order.
            start: the position before the first of them.
            rank: whose they are, for the thread's name.
            global_batch: samples of a step over all ranks, for those who ask.
        """
        self.global_batch = global_batch
        self.telemetry: Telemetry | None = None  # set before the first step: a trace then shows when steps were made
        self._make_steps = make_steps
        self._steps = iter(make_steps(start, weights))
        self._replaced = 0  # how often
        self._rank = rank
        self._position = start
        self._ready: deque[Step] = deque()
        self._depth = MIN_PREFETCHED_STEPS
        self._finished = False
        self._closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BatchLoader:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches; blocks while they are not ready.

        Raises:
            StopIteration: the last step was given, or the loader is closed.
            Exception: what the dataset raised, after the steps before it were given.
        """
        self._start()
        with self._changed:
            while not (self._ready or self._finished or self._closed):
                self._changed.wait(WAIT_SLICE)
            if self._ready and not self._closed:
                micro_batches, self._position = self._ready.popleft()
                if len(self._ready) <= self._depth // 2:  # one wake-up for half of what may be ready
                    self._changed.notify_all()
                return micro_batches
        self.close()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def position(self) -> JsonObject:
        """Where a run goes on that has done all steps given so far. What was prepared ahead does not count."""
        return self._position

    def reshare(self, weights: Sequence[float]) -> None:
        """From the next step on the ranks have other shares. What is prepared is made anew."""
        with self._changed:
            self._steps = iter(self._make_steps(self._position, weights))
            self._replaced += 1
            self._ready.clear()
            self._changed.notify_all()
            ended, self._finished = self._thread if self._finished else None, False
        if ended is not None and not self._closed:  # it had made the last step; now there are others
            ended.join(JOIN_TIMEOUT)
            self._thread = None
            self._start()

    def close(self) -> None:
        """Stop the thread and join it; what it prepared is dropped. Blocks until the batch in work is made."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(JOIN_TIMEOUT)
            if self._thread.is_alive():
                logger.warning("loader still makes a batch rank=%d after=%ss", self._rank, JOIN_TIMEOUT)

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            # daemon: a dataset that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._run, name=f"smolcluster-loader-{self._rank}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                with self._changed:
                    steps, replaced = self._steps, self._replaced
                with nullcontext() if self.telemetry is None else self.telemetry.traced("load", LOADER):
                    step = next(steps, None)
                if self._replaced != replaced:
                    continue
                if step is None:
                    return
                nbytes = sum(batch.inputs.nbytes + batch.targets.nbytes for batch in step[0])
                with self._changed:
                    fitting = PREFETCHED_BYTES // max(nbytes, 1)
                    self._depth = max(MIN_PREFETCHED_STEPS, min(MAX_PREFETCHED_STEPS, fitting))
                    if not self._closed and self._replaced == replaced:
                        self._ready.append(step)
                        if len(self._ready) == 1:  # only then can somebody be waiting
                            self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - a thread's top: kept for the consumer, which raises it
            self._error = error
        finally:
            self._steps = iter(())  # closes the files that it holds open
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Block while enough steps are ready; False once the loader is closed."""
        with self._changed:
            if len(self._ready) >= self._depth:
                self._changed.wait_for(lambda: len(self._ready) <= self._depth // 2 or self._closed)
            return not self._closed


def sampled_steps(
    dataset: Dataset,
    sampler: Sampler,
    rank: int,
    micro_batches: int = 1,
    start_step: int = 0,
    max_steps: int | None = None,
    *,
    micro_first: bool = False,
    reads: Reads = "all",
) -> Iterator[Step]:
    """The steps of one rank over a split in memory.

    Args:
        dataset: where samples come from.
        sampler: which samples each step takes.
        rank: whose part of them.
        micro_batches: parts that a step's samples are split into, as equal as they can be: the same number on every
            rank and in every step, so that algorithms which communicate for each of them stay in step. Where samples
            are fewer, some have 0.
        start_step: number of the first step; of a resumed run the first that is not done.
        max_steps: number of steps of the whole run: the last step is max_steps - 1. None: without end.
        micro_first: see `micro_ranges`.
        reads: what of its samples the rank looks at.
    """
    for step in count(start_step) if max_steps is None else range(start_step, max_steps):
        indices = sampler.global_indices(step)
        planned = dataset.targets_per_sample(indices) if reads in ("all", "targets") else 0
        ranges = micro_ranges(len(indices), sampler.weights, rank, micro_batches, micro_first=micro_first)
        pieces = [indices[part.start : part.stop] for part in ranges]
        place: JsonObject = {"step": step + 1, "samples": len(dataset)}
        yield [_read(dataset, piece, planned, reads) for piece in pieces], place


def _read(dataset: Dataset, indices: Tensor, planned: int, reads: Reads) -> Batch:
    if reads == "nothing":
        return unread(len(indices))
    return read_only(Batch(*dataset.batch(indices), planned_count=planned), reads)


def eval_batches(
    dataset: Dataset, batch_size: int, rank: int = 0, world_size: int = 1, *, reads: Reads = "all"
) -> Iterator[Batch]:
    """The batches of one rank that, over all ranks, hold every sample of `dataset` exactly once, in order.

    Every rank gets the same number of batches, so that algorithms that communicate in evaluation stay in step; at
    the ragged end some are smaller or have 0 samples.

    Args:
        dataset: the split to evaluate.
        batch_size: most samples in one batch of one rank.
        rank: this rank.
        world_size: ranks that share the split.
        reads: what of its samples the rank looks at.
    """
    for start in range(0, len(dataset), batch_size * world_size):
        end = min(start + batch_size * world_size, len(dataset))
        counts = split_by_shares(end - start, [1.0] * world_size)
        first = start + sum(counts[:rank])
        indices = torch.arange(first, first + counts[rank])
        if reads == "nothing":
            yield unread(len(indices))
        else:
            yield read_only(Batch(*dataset.batch(indices), graded=dataset.graded(indices)), reads)
