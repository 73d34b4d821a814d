"""Flat gradient buckets: one all-reduce carries many parameters, and runs while backward computes the rest.

Backward computes the gradients of the last layers first. So buckets are filled and sent from the last parameter to the
first; as soon as one is full, its all-reduce starts and backward goes on. The order is fixed by the parameters' order,
never by the order in which hooks fire, so that every rank issues the same operations and adds the same numbers.

One step, as an algorithm sees it:

    buckets.begin(step, ...)          a free set of buckets; what this rank contributes besides gradients
    ... buckets.arm(loss_sum)         before the last micro-batch's backward: from now on hooks copy and send
    gradients = buckets.flush()       after it: zeros for parameters that got no gradient, and the rest is sent
    sums = gradients.wait()           now, or K steps later
    gradients.install()               the parameters' .grad are the reduced gradients

Cost: one copy of the gradients per step (none at world size 1) and `sets` times their memory, with int8 once more: what
its encodings have lost (codec.ErrorFeedback) is kept for each bucket, whichever set carries it.

Where the communicator reduces tensors wherever they lie (two ranks that share memory), nothing is copied and no hook
runs: all gradients go in one call after backward. There the all-reduce takes a few percent of backward's time, all of
it the processor's, and overlapping it would cost more than it hides.
Source: Li et al. 2020, PyTorch Distributed, arXiv:2006.15704, section 3.2.3 (buckets, overlap).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Codec, Communicator, Work
from smolcluster.collectives.codec import ErrorFeedback, Int8Codec
from smolcluster.errors import CollectiveMismatch, ConfigError
from smolcluster.telemetry import BUCKETS, Telemetry

# Below 1 MiB the cost per operation shows, above 8 MiB little is left to overlap with.
DEFAULT_BUCKET_BYTES = 4 * 2**20
# A small model gets smaller buckets, since what the last bucket holds cannot overlap with anything. For a GPT of 7 MB
# whose all-reduce takes as long as its backward, 8 parts hide 78 % of it, three buckets of up to 4 MiB 33 %. More
# parts hide little more, and over loopback each operation costs both ranks' cores some 0.2 ms.
MIN_PARTS = 8
MIN_BUCKET_BYTES = 256 * 2**10
# The first bucket is small, so that the network has work early in backward.
FIRST_BUCKET_BYTES = 2**20

# Where gradients are reduced where they lie: from this size on, an operation of its own costs less than a copy.
LARGE_BYTES = 64 * 2**10

# The tail's fields before its one field per parameter: loss sum, targets, samples, planned targets, ranks whose
# loss is not finite, stop votes.
_TAIL_FIELDS = 6


@dataclass(frozen=True, slots=True)
class StepSums:
    """What all ranks contributed to one step besides gradients.

    Attributes:
        loss_sum: over all targets.
        count: targets computed.
        samples: samples computed.
        nonfinite: ranks whose loss (with a codec: or gradient) was not finite.
        stop_votes: ranks that asked to stop.
    """

    loss_sum: float
    count: int
    samples: int
    nonfinite: int
    stop_votes: int


@dataclass(frozen=True, slots=True)
class _Own:
    """What this rank contributes to a step."""

    step: int
    count: int
    samples: int
    planned: int
    stop: bool


class GradientBuckets:
    """The gradient buckets of one model on one rank.

    Hooks run on autograd's thread, everything else on the caller's; the two never run at the same time.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        comm: Communicator,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        codec: Codec | None = None,
        sets: int = 1,
    ) -> None:
        """Lay out the buckets and register the hooks. Every rank does; they agree on how gradients are reduced.

        Args:
            params: the parameters to train, in the same order on every rank, all on one device.
            comm: reduces the buckets; it stages what is not in CPU memory.
            bucket_bytes: most that a bucket holds; a larger parameter has one of its own. See plan_buckets.
            codec: what goes over the wire instead of the gradients' own bytes.
            sets: steps that may be under way at once (K + 1).
        """
        self._params = list(params)
        self._comm = comm
        is_scattered = comm.all_reduce_scattered is not None and codec is None
        if is_scattered:
            # Only what lies in the CPU's memory can be read by another process, and ranks may differ in their devices.
            is_on_cpu = all(param.device.type == "cpu" for param in self._params)
            is_scattered = all(comm.exchange(is_on_cpu))
        self._layout = by_dtype(self._params) if is_scattered else plan_buckets(self._params, bucket_bytes)
        self._codecs: list[Codec | ErrorFeedback | None] = [codec] * len(self._layout)
        self._bucket_of = {index: i for i, bucket in enumerate(self._layout) for index in bucket}
        self._own: _Own | None = None
        self._is_armed = False
        self._handles = []
        self._sets: list[_FlatSet | _ScatteredSet] = []
        self._timeline = _Timeline(comm.telemetry, follow=sets > 1)
        if comm.world_size > 1:
            # Sums of counts must be exact: float32 counts to 16.7 million, more targets than one step has, but
            # half precision and lossy codecs do not.
            tail_dtype = self._params[self._layout[-1][0]].dtype if self._layout else None
            has_own_tail = codec is not None or tail_dtype not in (torch.float32, torch.float64)
            kind = _ScatteredSet if is_scattered else _FlatSet
            self._sets = [kind(self._params, self._layout, has_own_tail) for _ in range(sets)]
        if comm.world_size > 1 and not is_scattered:
            self._handles = [
                param.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
                for index, param in enumerate(self._params)
            ]
        self._residuals: dict[int, Tensor] = {}
        if isinstance(codec, Int8Codec) and self._sets:
            for i, bucket in enumerate(self._layout):
                elements = sum(self._params[index].numel() for index in bucket)
                dtype = self._params[bucket[0]].dtype
                feedback = ErrorFeedback(codec, torch.zeros(elements, dtype=dtype))
                self._codecs[i] = feedback
                self._residuals |= _places(feedback.residual, bucket, self._params)

    @property
    def residuals(self) -> list[Tensor]:
        """With int8: what was lost of each parameter's gradients, in its shape, on the CPU; else none.

        To be read and written while no step is under way: all issued buckets' sums were waited for.
        """
        return [self._residuals[index] for index in sorted(self._residuals)]

    def begin(self, step: int, *, count: int, samples: int, planned: int = 0, stop: bool = False) -> None:
        """Open a step. The set it uses is that of step - sets, whose gradients must be applied by now.

        Args:
            step: from 0, one after the other.
            count: targets on this rank.
            samples: samples on this rank.
            planned: targets of the whole step as planned, the same on every rank.
            stop: vote for stopping after this step.
        """
        self._comm.telemetry.step = step
        self._own = _Own(step, count, samples, planned, stop)
        self._loss_sum: Tensor | None = None
        if not self._sets:
            return
        self._set = self._sets[step % len(self._sets)]
        self._missing = [len(bucket) for bucket in self._layout]
        self._taken = [False] * len(self._params)
        self._pending: list[_Pending] = []
        self._overflowed: Tensor | None = None

    def arm(self, loss_sum: Tensor) -> None:
        """From now on a parameter's gradient is copied and sent as soon as it is complete.

        Args:
            loss_sum: this rank's summed loss, ().
        """
        self._loss_sum = loss_sum
        if self._sets:
            self._write_tail(loss_sum)
            self._is_armed = True

    def flush(self) -> StepGradients:
        """End the step's backward: send what is left, with zeros for parameters without a gradient."""
        self._is_armed = False
        own = self._own
        assert own is not None, "flush without begin"
        if not self._sets:
            grads = [param.grad for param in self._params]
            return StepGradients(own, self._params, grads, self._comm, self._loss_sum, None, [], self._timeline)
        if self._loss_sum is None:
            self._write_tail(torch.zeros(()))
        for index in reversed(range(len(self._params))):
            if not self._taken[index]:
                self._take(index)
        if self._set.has_own_tail:
            if self._overflowed is not None:
                self._set.tail[4] += self._overflowed.cpu()
            self._pending.append(_Pending(self._comm.all_reduce(self._set.tail), self._set.tail.nbytes))
        reduced: list[Tensor | None] = [*self._set.hand_over()]
        tail = self._set.tail
        return StepGradients(own, self._params, reduced, self._comm, None, tail, self._pending, self._timeline)

    def restore(self, step: int, grads: list[Tensor | None], sums: StepSums) -> StepGradients:
        """A step's gradients as a checkpoint kept them: reduced already."""
        own = _Own(step, 0, 0, 0, False)
        gradients = StepGradients(own, self._params, grads, self._comm, None, None, [], self._timeline)
        gradients._sums = sums
        return gradients

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def take_when_armed(_param: Tensor) -> None:
            if self._is_armed:
                self._take(index)

        return take_when_armed

    def _take(self, index: int) -> None:
        """Move parameter `index`'s gradient to its bucket; send every bucket that is full with all before it."""
        if self._taken[index]:
            raise ConfigError(
                f"parameter {index} of shape {tuple(self._params[index].shape)} received a gradient twice in one "
                f"backward. Use activation checkpointing with use_reentrant=False."
            )
        self._taken[index] = True
        param = self._params[index]
        if param.grad is None:
            self._set.tail[_TAIL_FIELDS + index] = 0.0
        self._set.put(index, param.grad)
        param.grad = None
        bucket = self._bucket_of[index]
        self._missing[bucket] -= 1
        while len(self._pending) < len(self._layout) and self._missing[len(self._pending)] == 0:
            self._send(len(self._pending))

    def _send(self, bucket: int) -> None:
        codec = self._codecs[bucket]
        if isinstance(self._set, _ScatteredSet):
            tensors = self._set.bucket(bucket)
            assert self._comm.all_reduce_scattered is not None
            work = self._comm.all_reduce_scattered(tensors)
            self._pending.append(_Pending(work, sum(tensor.nbytes for tensor in tensors)))
            return
        flat = self._set.buckets[bucket]
        if codec is not None:
            # A codec may turn what is not finite into numbers, so each rank says so before it encodes.
            overflowed = ~torch.isfinite(flat.sum())
            self._overflowed = overflowed if self._overflowed is None else self._overflowed | overflowed
        self._pending.append(_Pending(self._comm.all_reduce(flat, codec=codec), flat.nbytes))

    def _write_tail(self, loss_sum: Tensor) -> None:
        assert self._own is not None, "arm without begin"
        own, tail = self._own, self._set.tail
        tail[0].copy_(loss_sum)
        tail[1:_TAIL_FIELDS] = torch.tensor([own.count, own.samples, own.planned, 0.0, own.stop], dtype=tail.dtype)
        tail[4].copy_(~torch.isfinite(loss_sum))
        tail[_TAIL_FIELDS:] = 1.0  # who got a gradient; flush corrects it


class StepGradients:
    """One step's gradients on their way through the all-reduces."""

    def __init__(
        self,
        own: _Own,
        params: list[nn.Parameter],
        grads: list[Tensor | None],
        comm: Communicator,
        loss_sum: Tensor | None,
        tail: Tensor | None,
        pending: list[_Pending],
        timeline: _Timeline,
    ) -> None:
        self.step = own.step
        self._own = own
        self._params = params
        self._grads = grads
        self._comm = comm
        self._loss_sum = loss_sum
        self._tail = tail
        self._pending = pending
        self._timeline = timeline
        self._sums: StepSums | None = None

    @property
    def grads(self) -> list[Tensor | None]:
        """After `wait`: the reduced gradients in the order of the parameters; None where no rank had one."""
        return self._grads

    def wait(self) -> StepSums:
        """Block until every bucket is reduced; records where the time went. Again: the same answer at once.

        Raises:
            PeerLost: a rank is gone.
            CollectiveMismatch: the ranks planned different steps.
        """
        if self._sums is None:
            self._sums = self._wait()
        return self._sums

    def _wait(self) -> StepSums:
        if self._tail is None:
            loss = 0.0 if self._loss_sum is None else float(self._loss_sum)
            own = self._own
            return StepSums(loss, own.count, own.samples, int(not math.isfinite(loss)), int(own.stop))
        start = time.monotonic()
        for pending in self._pending:
            pending.work.wait()
        end = time.monotonic()
        self._comm.telemetry.record("comm_wait", start, end, self.step, details={"call": "all_reduce"})
        self._timeline.record(self._pending, self.step, (start, end))
        self._pending = []
        loss_sum, count, samples, planned, nonfinite, votes, *users = self._tail.tolist()
        if abs(planned - self._own.planned * self._comm.world_size) > 1e-6 * planned:
            raise CollectiveMismatch(
                f"step {self.step}: rank {self._comm.rank} planned {self._own.planned} targets, but the mean over "
                f"all {self._comm.world_size} ranks is {planned / self._comm.world_size:g}. Batch.planned_count is "
                f"that of the whole step: give every rank the same number."
            )
        for index, ranks in enumerate(users):
            if ranks == 0:  # used nowhere: plain PyTorch has no gradient here, and AdamW then decays nothing
                self._grads[index] = None
        return StepSums(loss_sum, round(count), round(samples), round(nonfinite), round(votes))

    def install(self) -> None:
        """Make the reduced gradients the parameters' `.grad`; None where no rank had one."""
        for param, grad in zip(self._params, self._grads, strict=True):
            if grad is not None and grad.stride() != param.stride():
                # On the wire every rank counts rows first; fused optimizers want the parameter's own layout.
                grad = torch.empty_like(param).copy_(grad)
            param.grad = grad


def plan_buckets(params: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[int]]:
    """Which parameters share a bucket, in the order of sending.

    Buckets hold one dtype. The first takes at most FIRST_BUCKET_BYTES, and is sent first because it holds the last
    parameters; in general a bucket is complete when its earliest parameter is, and that orders them. Small models
    are cut into MIN_PARTS, so that backward can hide most of them.

    Args:
        params: in the model's order.
        bucket_bytes: no bucket holds more, unless one parameter does.

    Returns:
        Lists of parameter indices, each descending.
    """
    nbytes_of = [param.numel() * param.element_size() for param in params]
    bucket_bytes = min(bucket_bytes, max(MIN_BUCKET_BYTES, sum(nbytes_of) // MIN_PARTS))
    buckets: list[list[int]] = []
    open_buckets: dict[torch.dtype, tuple[list[int], int]] = {}
    for index in reversed(range(len(params))):
        nbytes = nbytes_of[index]
        bucket, used = open_buckets.get(params[index].dtype, ([], 0))
        limit = min(bucket_bytes, FIRST_BUCKET_BYTES) if len(buckets) <= 1 else bucket_bytes
        if not bucket or used + nbytes > limit:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(index)
        open_buckets[params[index].dtype] = (bucket, used + nbytes)
    return sorted(buckets, key=lambda bucket: -bucket[-1])


def by_dtype(params: Sequence[nn.Parameter]) -> list[list[int]]:
    """One bucket for each dtype, as `plan_buckets` gives them."""
    buckets: dict[torch.dtype, list[int]] = {}
    for index in reversed(range(len(params))):
        buckets.setdefault(params[index].dtype, []).append(index)
    return list(buckets.values())


class _FlatSet:
    """The gradients of one step in flight, copied together: a flat tensor for each bucket."""

    def __init__(self, params: list[nn.Parameter], layout: list[list[int]], has_own_tail: bool) -> None:
        self.has_own_tail = has_own_tail
        self.buckets: list[Tensor] = []
        tail_length = _TAIL_FIELDS + len(params)
        views: dict[int, Tensor] = {}
        for bucket in layout:
            is_tailed = bucket is layout[-1] and not has_own_tail
            length = sum(params[index].numel() for index in bucket) + (tail_length if is_tailed else 0)
            first = params[bucket[0]]
            flat = torch.zeros(length, dtype=first.dtype, device=first.device)
            views |= _places(flat, bucket, params)
            self.buckets.append(flat)
        self.grads = [views[index] for index in range(len(params))]
        # On the CPU: Apple's MPS has no float64.
        self.tail = torch.zeros(tail_length, dtype=torch.float64) if has_own_tail else flat[-tail_length:]

    def put(self, index: int, grad: Tensor | None) -> None:
        """Take over a parameter's gradient; None: zeros."""
        if grad is None:
            self.grads[index].zero_()
        else:
            self.grads[index].copy_(grad)

    def hand_over(self) -> list[Tensor]:
        """The step's gradients, of which all are sent."""
        return self.grads


class _ScatteredSet:
    """The gradients of one step in flight where autograd left them, but for small ones, which are copied together."""

    def __init__(self, params: list[nn.Parameter], layout: list[list[int]], has_own_tail: bool) -> None:
        self.has_own_tail = has_own_tail
        self._params = params
        tail_length = _TAIL_FIELDS + len(params)
        self._large = [[index for index in bucket if _is_large(params[index])] for bucket in layout]
        self._storages: set[int] = set()  # where large gradients of this step lie
        small = [[index for index in bucket if not _is_large(params[index])] for bucket in layout]
        self._together: list[Tensor] = []
        self.grads: list[Tensor] = [*params]  # replaced in every step
        for bucket, indices in zip(layout, small, strict=True):
            is_tailed = bucket is layout[-1] and not has_own_tail
            length = sum(params[index].numel() for index in indices) + (tail_length if is_tailed else 0)
            flat = torch.zeros(length, dtype=params[bucket[0]].dtype)
            for index, place in _places(flat, indices, params).items():
                self.grads[index] = place
            self._together.append(flat)
        self.tail = torch.zeros(tail_length, dtype=torch.float64) if has_own_tail else flat[-tail_length:]

    def put(self, index: int, grad: Tensor | None) -> None:
        """Take over a parameter's gradient; None: zeros."""
        if grad is None:
            grad = torch.zeros_like(self._params[index])
        if not _is_large(grad):
            self.grads[index].copy_(grad)
            return
        grad = grad.contiguous()
        storage = grad.untyped_storage().data_ptr()
        if storage in self._storages:
            # Two parameters of which views were added: autograd gave both the same memory, which would be added twice.
            grad = grad.clone()
        self._storages.add(storage)
        self.grads[index] = grad

    def hand_over(self) -> list[Tensor]:
        """The step's gradients, of which all are sent; keeps no large one longer than the step does."""
        grads = [*self.grads]
        for indices in self._large:
            for index in indices:
                self.grads[index] = self._params[index]
        self._storages.clear()
        return grads

    def bucket(self, number: int) -> list[Tensor]:
        """What bucket `number` consists of."""
        return [*(self.grads[index] for index in self._large[number]), self._together[number]]


def _is_large(tensor: Tensor) -> bool:
    return tensor.nbytes >= LARGE_BYTES


def _places(flat: Tensor, bucket: list[int], params: list[nn.Parameter]) -> dict[int, Tensor]:
    """Where in its bucket's flat tensor each parameter lies, in its shape."""
    places, offset = {}, 0
    for index in bucket:
        places[index] = flat[offset : offset + params[index].numel()].view(params[index].shape)
        offset += params[index].numel()
    return places


class _Pending:
    """One all-reduce under way, and when it ran."""

    def __init__(self, work: Work, nbytes: int) -> None:
        self.nbytes = nbytes
        self.issued = time.monotonic()
        self.ended: float | None = None
        self.work = work
        work.add_done_callback(self._note_end)

    def _note_end(self, _work: Work) -> None:
        self.ended = time.monotonic()


class _Timeline:
    """Records each all-reduce from when it could run: a communicator runs them one after the other."""

    def __init__(self, telemetry: Telemetry, *, follow: bool) -> None:
        """`follow`: the next step's may begin as soon as one step's have ended."""
        self._telemetry = telemetry
        self._follow = follow
        self._previous = 0.0  # when the one before it ended, perhaps of an earlier step

    def record(self, pending: list[_Pending], step: int, wait: tuple[float, float]) -> None:
        """Record those of `step`, for which the thread waited from wait[0] to wait[1]."""
        for bucket, item in enumerate(pending):
            ended = item.ended
            # What was waited for ends when the thread goes on: the system may take its time to wake it, and the two
            # measurements would differ by that. The thread may also be quicker than the callback.
            is_last = item is pending[-1] and not self._follow
            if ended is None or (is_last and ended > wait[0]):
                ended = wait[1]
            details: dict[str, int | str] | None = None
            if self._telemetry.trace is not None:
                details = {"bucket": bucket, "bytes": item.nbytes}
                if item.work.call_id is not None:
                    details["group"], details["sequence"] = item.work.call_id
            start = max(item.issued, self._previous)
            ended = max(start, ended)
            self._telemetry.record("all_reduce", start, ended, step, track=BUCKETS, details=details)
            self._previous = ended
