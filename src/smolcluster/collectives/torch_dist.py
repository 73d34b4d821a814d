"""The communicator over torch.distributed: gloo between CPUs, NCCL between GPUs of a data centre.

Idea      The same algorithms run where somebody outgrows home machines. Every call becomes one of torch.distributed,
          made by one thread that runs collectives in the order of their calls; a caller only waits. Before each
          collective (unless `verify` is off, as for NCCL) the ranks compare what they are about to do, as gloo would
          end the process when they differ. Messages have a thread for every (peer, tag) that is under way.
Cost      gloo's, plus one small all-gather per collective. A codec saves bytes only up to 3 ranks, as all
          contributions go to everybody: (N-1)/2 * S bytes with bf16 against 2(N-1)/N * S without.
Breaks if the membership changes: torch.distributed fixes it at the start. Elastic runs need the tcp engine.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from smolcluster.collectives import checks
from smolcluster.collectives.base import Codec, ReduceOp, Work
from smolcluster.collectives.codec import ErrorFeedback
from smolcluster.collectives.staging import DeviceStaging, Staging
from smolcluster.collectives.torch_group import (
    CLOSE,
    Call,
    all_gather_flat,
    break_group,
    compare_calls,
    gather_bytes,
    gather_ragged_bytes,
    open_group,
    prefixed,
    reduce_scatter_flat,
    translate,
    wait,
)
from smolcluster.collectives.torch_lanes import Run, WorkLanes
from smolcluster.collectives.wire import combine, finish_average
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import (
    ClusterError,
    CollectiveMismatch,
    ConfigError,
    RendezvousTimeout,
    SmolError,
)
from smolcluster.kinds import JsonValue
from smolcluster.telemetry import Telemetry
from smolcluster.transport.tensors import dtype_code, dtype_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed has it too, but its stubs do not say so

# torch's own default. A call without progress for so long breaks the group, a receive that waits for it too.
DEFAULT_TIMEOUT = 1800.0
# How long `close` waits for the other ranks to close, so that nobody's last bytes are cut off.
CLOSE_TIMEOUT = 5.0

# Dims of a message's header, as in the frames of the tcp engine.
_MAX_DIMS = 8


def init_torch_dist(
    backend: str,
    rank: int,
    world_size: int,
    init_method: str = "env://",
    timeout: float = DEFAULT_TIMEOUT,
    *,
    start_timeout: float = 60.0,
    min_ranks: int | None = None,
) -> TorchCommunicator:
    """Join a job and connect its ranks; blocks until all are there.

    Args:
        backend: "gloo" or "nccl".
        rank: of this process.
        world_size: number of ranks.
        init_method: "tcp://host:port" of rank 0, "env://" (MASTER_ADDR and MASTER_PORT), or "file://path".
        timeout: seconds without progress after which a collective or receive breaks the group.
        start_timeout: seconds to wait for the other ranks.
        min_ranks: `cluster.min_ranks`; fewer than world_size is refused.

    Raises:
        ConfigError: an elastic run, or a backend that this machine does not have.
        RendezvousTimeout: not every rank came in time.
    """
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed: use --backend tcp")
    from torch.distributed.rendezvous import rendezvous  # not importable in such a build

    if min_ranks is not None and min_ranks < world_size:
        raise ConfigError(
            f"cluster.min_ranks is {min_ranks} of {world_size}, but torch.distributed ({backend}) cannot go on without "
            "a lost rank: its groups are fixed at the start. Use --backend tcp, or leave min_ranks out"
        )
    seconds = timedelta(seconds=start_timeout)
    try:
        store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=seconds))
        store.set_timeout(seconds)
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(world_size)], seconds)
    except (RuntimeError, ValueError, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else repr(exc)
        raise RendezvousTimeout(
            f"rank {rank} did not meet all {world_size} ranks at {init_method} within {start_timeout:g} s ({reason}). "
            "Start the other ranks, and check that the address and port of rank 0 can be reached"
        ) from exc
    return TorchCommunicator(prefixed("world", store), rank, world_size, backend=backend, timeout=timeout)


class TorchCommunicator:
    """See collectives.base.Communicator.

    Differences that torch.distributed imposes: a wait or receive longer than `timeout` breaks the group; which rank is
    lost is known for messages only (PeerLost.rank is -1 otherwise); `abort` also ends what the peers have pending, with
    PeerLost; `link/*` counters stay zero, as torch does not count bytes. Device tensors go over NCCL where `backend` is
    "nccl" and they are CUDA's, else through the host; messages always through the host.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        backend: str = "gloo",
        timeout: float = DEFAULT_TIMEOUT,
        verify: bool | None = None,
        name: str = "world",
        staging: Staging | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Connect the ranks that meet at `store`; blocks until all are there.

        Args:
            store: the same for all ranks of this group, and of this group only (use a PrefixStore).
            rank: of this process in the group.
            world_size: number of ranks in the group.
            backend: "gloo" or "nccl".
            timeout: seconds without progress after which a collective or receive breaks the group.
            verify: compare the ranks' calls before each collective; None: yes for gloo, which ends the process
                otherwise, no for NCCL, where it would cost more than the collective.
            name: of the group, for messages.
            staging: how device tensors reach host memory.
            telemetry: where counters and spans go; None: a new one.

        Raises:
            ConfigError: the backend is unknown or not there.
            PeerLost: a rank ended while connecting.
            CollectiveTimeout: a rank did not connect in time.
        """
        self.rank = rank
        self.world_size = world_size
        self.generation = 0
        self.telemetry = telemetry or Telemetry()
        self.all_reduce_scattered = None
        self._name = name
        self._store = store
        self._backend = backend
        self._timeout = timeout
        self._verify = backend == "gloo" if verify is None else verify
        self._staging = staging or DeviceStaging()
        self._is_closed = False
        self._children: list[TorchCommunicator] = []
        self._calls = 0
        self._splits = 0
        self._lanes = WorkLanes(f"rank {rank} of {name}", self.abort)
        try:
            self._group = open_group(backend, store, rank, world_size, timeout)
        except RuntimeError as exc:
            raise translate(exc, f"rank {rank} connecting group {name}", -1) from exc
        atexit.register(self._end)

    # ---- collectives

    def all_reduce(
        self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | ErrorFeedback | None = None
    ) -> Work:
        checks.check_all_reduce(tensor, op, codec)
        self._check_dtype(tensor)
        host, restore = self._stage(tensor)

        def run() -> list[Tensor]:
            flat = host.view(-1)
            if codec is not None:
                plain = codec.codec if isinstance(codec, ErrorFeedback) else codec
                gathered = gather_bytes(self._group, _encoded(flat, codec), self.world_size)
                _reduce_encoded(flat, gathered, op, plain)
            else:
                wait(dist.all_reduce(flat, op=_torch_op(op), group=self._group, async_op=True))
                finish_average(flat, op, self.world_size)
            restore()
            return [tensor]

        return self._submit(Call(f"all_reduce {op.name} of {_describe(tensor, codec)}"), run, host)

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None
    ) -> Work:
        checks.check_reduce_scatter(output, input, op, codec, self.world_size)
        self._check_dtype(input)
        whole, _ = self._stage(input)
        part, restore = self._stage(output)

        def run() -> list[Tensor]:
            result = part.view(-1)  # may be a part of `whole`: gloo and NCCL allow it
            if codec is not None:
                encoded = torch.stack([_encoded(row, codec) for row in whole.view(self.world_size, -1)])
                received = torch.empty_like(encoded)
                wait(dist.all_to_all_single(received, encoded, group=self._group, async_op=True))
                _reduce_encoded(result, received, op, codec)
            else:
                reduce_scatter_flat(self._group, result, whole.view(-1), _torch_op(op))
                finish_average(result, op, self.world_size)
            restore()
            return [output]

        return self._submit(Call(f"reduce_scatter {op.name} of {_describe(input, codec)}"), run, whole)

    def all_gather(self, output: Tensor, input: Tensor, codec: Codec | None = None) -> Work:
        checks.check_all_gather(output, input, codec, self.world_size)
        whole, restore = self._stage(output)
        part, _ = self._stage(input)

        def run() -> list[Tensor]:
            if codec is not None:
                gathered = gather_bytes(self._group, _encoded(part.view(-1), codec), self.world_size)
                for row, data in zip(whole.view(self.world_size, -1), gathered, strict=True):
                    codec.decode(data, row)
            else:
                all_gather_flat(self._group, _as_bytes(whole), _as_bytes(part))
            restore()
            return [output]

        return self._submit(Call(f"all_gather of {_describe(input, codec)}"), run, whole)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Work:
        checks.check_broadcast(tensor, src, self.world_size)
        host, restore = self._stage(tensor)

        def run() -> list[Tensor]:
            wait(dist.broadcast(_as_bytes(host), group_src=src, group=self._group, async_op=True))
            restore()
            return [tensor]

        return self._submit(Call(f"broadcast from rank {src} of {_describe(tensor)}"), run, host)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
    ) -> Work:
        incoming, outgoing = checks.check_all_to_all(output, input, output_rows, input_rows, self.world_size)
        received, restore = self._stage(output)
        sent, _ = self._stage(input)
        row_bytes = input.shape[1:].numel() * input.element_size()

        def run() -> list[Tensor]:
            self._all_to_all_bytes(
                _as_bytes(received),
                _as_bytes(sent),
                [rows * row_bytes for rows in incoming],
                [rows * row_bytes for rows in outgoing],
            )
            restore()
            return [output]

        says = f"all_to_all of {input.dtype} rows of {tuple(input.shape[1:])}"
        return self._submit(Call(says, incoming, outgoing), run, sent)

    def all_to_all_ragged(self, inputs: Sequence[Tensor]) -> Work:
        checks.check_ragged(inputs, self.world_size)
        hosts = [self._staging.to_host(tensor.detach()) for tensor in inputs]
        dtype = inputs[0].dtype

        def run() -> list[Tensor]:
            shapes = [json.loads(part) for part in gather_ragged_bytes(self._group, _shapes(hosts), self.world_size)]
            mine = [torch.Size(shapes[src][self.rank]) for src in range(self.world_size)]
            buffer = torch.empty(sum(shape.numel() for shape in mine), dtype=dtype)
            self._all_to_all_bytes(
                _as_bytes(buffer),
                torch.cat([_as_bytes(host) for host in hosts]),
                [shape.numel() * buffer.element_size() for shape in mine],
                [host.nbytes for host in hosts],
            )
            parts = torch.split(buffer, [shape.numel() for shape in mine])
            return [part.view(shape) for part, shape in zip(parts, mine, strict=True)]

        return self._submit(Call(f"all_to_all_ragged of {dtype}"), run)

    def exchange(self, message: JsonValue, timeout: float | None = None) -> list[JsonValue]:
        encoded = checks.encode_message(message)
        messages: list[JsonValue] = []

        def run() -> list[Tensor]:
            messages.extend(json.loads(part) for part in gather_ragged_bytes(self._group, encoded, self.world_size))
            return []

        self._submit(Call("exchange"), run).wait(timeout)
        return messages

    def barrier(self, timeout: float | None = None) -> None:
        def run() -> list[Tensor]:
            if not self._verify:  # else the comparison of the calls has already waited for everybody
                gather_bytes(self._group, torch.zeros(1, dtype=torch.uint8), self.world_size)
            return []

        self._submit(Call("barrier"), run).wait(timeout)

    # ---- point-to-point

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        checks.check_peer(self.rank, dst, tag, self.world_size, "dst")
        checks.check_contiguous(tensor, "tensor")
        if tensor.dim() > _MAX_DIMS:
            raise ValueError(f"a tensor with {tensor.dim()} dims, at most {_MAX_DIMS} can be sent: reshape it")
        header = torch.zeros(2 + _MAX_DIMS, dtype=torch.int64)
        header[:2] = torch.tensor([dtype_code(tensor.dtype), tensor.dim()])
        header[2 : 2 + tensor.dim()] = torch.tensor(tensor.shape)
        data = _as_bytes(self._staging.to_host(tensor.detach()))

        def run() -> list[Tensor]:
            for part, part_tag in ((header, 2 * tag), (data, 2 * tag + 1)):
                if part.numel():
                    wait(dist.isend(part, group=self._group, group_dst=dst, tag=part_tag))
            return [tensor]

        return self._lanes.message("send to", dst, tag, run)

    def recv(self, src: int, tag: int, out: Tensor | None = None) -> Work:
        checks.check_peer(self.rank, src, tag, self.world_size, "src")
        if out is not None:
            checks.check_contiguous(out, "out")

        def run() -> list[Tensor]:
            header = torch.empty(2 + _MAX_DIMS, dtype=torch.int64)
            wait(dist.irecv(header, group=self._group, group_src=src, tag=2 * tag))
            code, dims, *shape = header.tolist()
            message = torch.empty(shape[:dims], dtype=dtype_of(code))
            if message.numel():
                wait(dist.irecv(_as_bytes(message), group=self._group, group_src=src, tag=2 * tag + 1))
            if out is None:
                return [message]
            if out.dtype != message.dtype or out.numel() != message.numel():
                raise CollectiveMismatch(
                    f"rank {src} sent {message.dtype} {tuple(message.shape)} with tag {tag}, but it was to be received "
                    f"into {out.dtype} {tuple(out.shape)}: check which tags and shapes the two ranks use"
                )
            out.detach().copy_(message.view_as(out))
            return [out]

        return self._lanes.message("recv from", src, tag, run)

    # ---- life

    def split(self, ranks: Sequence[int], name: str) -> TorchCommunicator | None:
        members = checks.check_split(ranks, self.world_size)
        self._submit(Call(f"split {name} of ranks {members}"), lambda: []).wait()
        self._splits += 1
        if self.rank not in members:
            return None
        child = TorchCommunicator(
            # Numbered, so that a second group of this name does not meet the addresses of the first.
            prefixed(f"{self._splits}.{name}", self._store),
            members.index(self.rank),
            len(members),
            backend=self._backend,
            timeout=self._timeout,
            verify=self._verify,
            name=f"{self._name}/{name}",
            staging=self._staging,
            telemetry=self.telemetry,
        )
        self._children.append(child)
        if self._lanes.error is not None:  # aborted meanwhile
            child.abort(self._lanes.error)
        return child

    def abort(self, error: SmolError) -> None:
        """Fail what is pending and all that comes with `error`, here and in the groups split from this one.

        The connections are closed, so the peers' pending calls fail too, with PeerLost. From any thread.
        """
        group = getattr(self, "_group", None)  # gone if this comes after close
        if not self._lanes.fail(error) or group is None:
            return
        break_group(group, self.rank, self.world_size, self._backend)
        for child in list(self._children):
            child.abort(error)

    def close(self) -> None:
        """Wait up to CLOSE_TIMEOUT for the other ranks to close, then leave. On every rank; may be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        is_idle = self._lanes.is_idle()
        for child in self._children:
            child.close()
        closed = ClusterError(f"rank {self.rank} has closed its communicator {self._name}: nothing can be called on it")
        if is_idle and self._say_goodbye():
            self._lanes.fail(closed)
        else:  # somebody is gone, or busy with what was left half done: end it
            self.abort(closed)
        self._end()
        atexit.unregister(self._end)

    # ---- helpers

    def _say_goodbye(self) -> bool:
        """Wait until all ranks close, so that nobody's last bytes are cut off; False if they do not."""
        try:
            self._submit(Call(CLOSE), lambda: []).wait(CLOSE_TIMEOUT)
        except SmolError:
            return False
        return True

    def _end(self) -> None:
        """End our threads and torch's.

        Also at exit: a thread that needs the interpreter after its end would abort the process, and gloo's own threads
        need it to free the tensors of the last call.
        """
        self.abort(ClusterError(f"rank {self.rank} ended with {self._name} still open"))
        self._lanes.close()
        if hasattr(self, "_group"):
            del self._group  # its destructor joins them; no call comes as far as using it any more

    def _submit(self, call: Call, run: Run, moved: Tensor | None = None) -> PendingWork:
        """Queue a collective: `run` moves `moved`, on the collectives' thread."""
        run = _on_side_stream(run, moved)

        def compared() -> list[Tensor]:
            self._calls += 1
            if self._verify:
                compare_calls(self._group, self._name, self.rank, self.world_size, call, self._calls)
            return run()

        return self._lanes.collective(call.says, compared)

    def _all_to_all_bytes(self, output: Tensor, input: Tensor, incoming: list[int], outgoing: list[int]) -> None:
        wait(dist.all_to_all_single(output, input, incoming, outgoing, group=self._group, async_op=True))

    def _stage(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The tensor as the backend takes it (CUDA for NCCL, else in host memory), and what copies that back."""
        own = tensor.detach()
        if self._is_direct(own):
            return own, lambda: None
        host = self._staging.to_host(own)
        return host, lambda: self._staging.from_host(host, own)

    def _is_direct(self, tensor: Tensor) -> bool:
        return self._backend == "nccl" and tensor.device.type == "cuda"

    def _check_dtype(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.int16:
            raise ValueError(f"{self._backend} cannot reduce int16 tensors: convert to int32 first")


def _on_side_stream(run: Run, moved: Tensor | None) -> Run:
    """For CUDA tensors: run after what the caller has queued so far, beside what it queues later, and to the end."""
    if moved is None or moved.device.type != "cuda":
        return run
    device = moved.device
    ready = torch.cuda.current_stream(device).record_event()

    def run_on_side_stream() -> list[Tensor]:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's constructor has no annotations
        side.wait_event(ready)
        with torch.cuda.stream(side):
            results = run()
        side.synchronize()
        return results

    return run_on_side_stream


def _torch_op(op: ReduceOp) -> dist.ReduceOp.RedOpType:
    # AVG is a sum here and divided afterwards: gloo's own rounds integers, and has no bfloat16 in older versions.
    return dist.ReduceOp.MAX if op == ReduceOp.MAX else dist.ReduceOp.SUM


def _encoded(flat: Tensor, codec: Codec | ErrorFeedback) -> Tensor:
    plain = codec.codec if isinstance(codec, ErrorFeedback) else codec
    out = torch.empty(plain.encoded_nbytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    if isinstance(codec, ErrorFeedback):
        residual = codec.residual.to(flat.device)  # itself, but with NCCL
        codec.codec.encode_with_feedback(flat, residual, out)
        codec.residual.copy_(residual)
    else:
        codec.encode(flat, out)
    return out


def _reduce_encoded(target: Tensor, encoded: Tensor, op: ReduceOp, codec: Codec) -> None:
    """Decode every rank's row and reduce into `target`, from rank 0 upwards: the same bits wherever it is done."""
    codec.decode(encoded[0], target)
    incoming = torch.empty_like(target)
    for row in encoded[1:]:
        codec.decode(row, incoming)
        combine(target, incoming, op)
    finish_average(target, op, encoded.shape[0])


def _as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as flat uint8: gloo moves only some dtypes, but any bytes."""
    return tensor.view(-1).view(torch.uint8)


def _shapes(tensors: Sequence[Tensor]) -> bytes:
    return json.dumps([list(tensor.shape) for tensor in tensors]).encode()


def _describe(tensor: Tensor, codec: Codec | ErrorFeedback | None = None) -> str:
    encoded = "" if codec is None else f" as {codec.name}"
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}{encoded}"
