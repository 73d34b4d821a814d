"""Batches of one rank: training batches made ahead by a thread of their own, evaluation batches on demand."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from itertools import count
from types import TracebackType

import torch

from smolcluster.data.batch import Batch
from smolcluster.data.datasets import Dataset
from smolcluster.data.sampler import Sampler, split_by_shares

logger = logging.getLogger(__name__)

# Steps ready ahead of the caller: two, or where steps are small so many as fit into PREFETCHED_BYTES. Loading is faster
# than a step, but where a step takes a millisecond, waking the thread for each would cost a tenth of it.
MIN_PREFETCHED_STEPS = 2
MAX_PREFETCHED_STEPS = 64
PREFETCHED_BYTES = 8 * 2**20
JOIN_TIMEOUT = 5.0
# A wait without an end cannot be interrupted by Ctrl-C on Windows.
WAIT_SLICE = 0.5


class BatchLoader:
    """Iterates over the steps of one rank: `next()` gives a step's micro-batches.

    A thread, started by the first `next()` or `with`, prepares the following steps while the caller computes.
    Close it (or use `with`); it also ends by itself after the last step. For one consuming thread.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        rank: int,
        micro_batches: int = 1,
        start_step: int = 0,
        max_steps: int | None = None,
    ) -> None:
        """Describe the batches; nothing is loaded yet.

        Args:
            dataset: where samples come from; its `batch` runs on the loader's thread.
            sampler: which samples each step takes.
            rank: whose part of them.
            micro_batches: parts that a step's samples are split into, as equal as they can be. A step with fewer
                samples has fewer, a step without any has one with 0 samples.
            start_step: number of the first step; of a resumed run the first that is not done.
            max_steps: number of steps of the whole run: the last step is max_steps - 1. None: without end.
        """
        self._dataset = dataset
        self._sampler = sampler
        self._rank = rank
        self._micro_batches = micro_batches
        self._steps = count(start_step) if max_steps is None else iter(range(start_step, max_steps))
        self._ready: deque[list[Batch]] = deque()
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
                micro_batches = self._ready.popleft()
                if len(self._ready) <= self._depth // 2:  # one wake-up for half of what may be ready
                    self._changed.notify_all()
                return micro_batches
        self.close()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and join it; what it prepared is dropped. Blocks until the batch in work is made."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(JOIN_TIMEOUT)
            if self._thread.is_alive():
                logger.warning("loader still in dataset=%s after=%ss", self._dataset.name, JOIN_TIMEOUT)

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            # daemon: a dataset that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._run, name=f"smolcluster-loader-{self._rank}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    if len(self._ready) >= self._depth:
                        self._changed.wait_for(lambda: len(self._ready) <= self._depth // 2 or self._closed)
                    if self._closed:
                        return
                micro_batches = self._load(step)
                nbytes = sum(batch.inputs.nbytes + batch.targets.nbytes for batch in micro_batches)
                with self._changed:
                    fitting = PREFETCHED_BYTES // max(nbytes, 1)
                    self._depth = max(MIN_PREFETCHED_STEPS, min(MAX_PREFETCHED_STEPS, fitting))
                    if not self._closed:
                        self._ready.append(micro_batches)
                        if len(self._ready) == 1:  # only then can somebody be waiting
                            self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - a thread's top: kept for the consumer, which raises it
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _load(self, step: int) -> list[Batch]:
        planned = self._dataset.targets_per_sample(self._sampler.global_indices(step))
        indices = self._sampler.rank_indices(step, self._rank)
        parts = max(1, min(self._micro_batches, len(indices)))
        pieces = torch.split(indices, split_by_shares(len(indices), [1.0] * parts))
        return [Batch(*self._dataset.batch(piece), planned_count=planned) for piece in pieces]


def eval_batches(dataset: Dataset, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The batches of one rank that, over all ranks, hold every sample of `dataset` exactly once, in order.

    Every rank gets the same number of batches, so that algorithms that communicate in evaluation stay in step; at
    the ragged end some are smaller or have 0 samples.

    Args:
        dataset: the split to evaluate.
        batch_size: most samples in one batch of one rank.
        rank: this rank.
        world_size: ranks that share the split.
    """
    for start in range(0, len(dataset), batch_size * world_size):
        end = min(start + batch_size * world_size, len(dataset))
        counts = split_by_shares(end - start, [1.0] * world_size)
        first = start + sum(counts[:rank])
        yield Batch(*dataset.batch(torch.arange(first, first + counts[rank])))
