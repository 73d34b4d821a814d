"""The communicator over torch.distributed: gloo between CPUs, NCCL between GPUs of a data centre.

Idea      The same algorithms run where somebody outgrows home machines. Every call becomes one of torch.distributed,
          made by one thread that runs collectives in the order of their calls; a caller only waits. Before each
          collective (unless `verify` is off, as for NCCL) the ranks compare what they are about to do, as gloo would
          end the process when they differ. Messages have a thread for every (peer, tag) that is under way.
Cost      gloo's, plus one small all-gather per collective. A codec saves bytes only up to 4 ranks, as all contributions go
          to everybody: (N-1)/2 * S bytes with bf16 against 2(N-1)/N * S without.
Breaks if the membership changes: torch.distributed fixes it at the start. Elastic runs need the tcp engine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from smolcluster.collectives import checks
from smolcluster.collectives.base import Codec, ReduceOp, Work
from smolcluster.collectives.staging import DeviceStaging, Staging
from smolcluster.collectives.torch_group import (
    all_gather_flat,
    break_group,
    gather_bytes,
    open_group,
    reduce_scatter_flat,
    translate,
    wait,
)
from smolcluster.collectives.torch_lanes import SerialThread
from smolcluster.collectives.wire import combine, finish_average
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import (
    ClusterError,
    CollectiveMismatch,
    ConfigError,
    PeerLost,
    RendezvousTimeout,
    SmolError,
)
from smolcluster.kinds import JsonValue
from smolcluster.telemetry import Telemetry
from smolcluster.transport.tensors import dtype_code, dtype_of

# torch's own default. A call without progress for so long breaks the group, a receive that waits for it too.
DEFAULT_TIMEOUT = 1800.0
# How long `close` waits for the other ranks to close, so that nobody's last bytes are cut off.
CLOSE_TIMEOUT = 5.0
# A step's collectives come within it, so that they share a thread; a forgotten communicator keeps none.
LINGER = 1.0

# What a rank is about to call, in the comparison before each collective.
_SAYS_BYTES = 192
_MAX_DIMS = 8
_OPS = {ReduceOp.SUM: dist.ReduceOp.SUM, ReduceOp.AVG: dist.ReduceOp.SUM, ReduceOp.MAX: dist.ReduceOp.MAX}
_CLOSE = "close"


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
    if min_ranks is not None and min_ranks < world_size:
        raise ConfigError(
            f"cluster.min_ranks is {min_ranks} of {world_size}, but torch.distributed ({backend}) cannot go on without a "
            "lost rank: its groups are fixed at the start. Use --backend tcp, or leave min_ranks out"
        )
    seconds = timedelta(seconds=start_timeout)
    try:
        store, rank, world_size = next(dist.rendezvous(init_method, rank, world_size, timeout=seconds))
        store.set_timeout(seconds)
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(world_size)], seconds)
    except (RuntimeError, ValueError, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else repr(exc)
        raise RendezvousTimeout(
            f"rank {rank} did not meet all {world_size} ranks at {init_method} within {start_timeout:g} s ({reason}). "
            "Start the other ranks, and check that the address and port of rank 0 can be reached"
        ) from exc
    return TorchCommunicator(dist.PrefixStore("world", store), rank, world_size, backend=backend, timeout=timeout)


class TorchCommunicator:
    """See collectives.base.Communicator.

    Differences that torch.distributed imposes: a wait or receive longer than `timeout` breaks the group; which rank is
    lost is known for messages only (PeerLost.rank is -1 otherwise); `abort` also ends what the peers have pending, with
    PeerLost; `link/*` counters stay zero, as torch does not count bytes. Device tensors go over NCCL where `backend` is
    "nccl" and they are CUDA's, else through the host; messages always through the host.
    """

    def __init__(
        self,
        store: dist.Store,
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
        self._name = name
        self._store = store
        self._backend = backend
        self._timeout = timeout
        self._verify = backend == "gloo" if verify is None else verify
        self._staging = staging or DeviceStaging()
        self._lock = threading.Lock()
        self._error: SmolError | None = None
        self._is_closed = False
        self._open_works: set[PendingWork] = set()
        self._children: list[TorchCommunicator] = []
        self._issued = 0
        self._splits = 0
        self._fifo = SerialThread(f"torch-dist {name} rank {rank}", LINGER)
        self._lanes: dict[tuple[str, int, int], SerialThread] = {}
        try:
            self._group = open_group(backend, store, rank, world_size, timeout)
        except RuntimeError as exc:
            raise translate(exc, f"rank {rank} connecting group {name}", -1) from exc

    # ---- collectives

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None) -> Work:
        checks.check_all_reduce(tensor, op, codec)
        self._check_dtype(tensor)
        host = self._host(tensor)

        def run() -> list[Tensor]:
            flat = host.view(-1)
            if codec is not None:
                gathered = gather_bytes(self._group, _encoded(flat, codec), self.world_size)
                _reduce_encoded(flat, gathered, op, codec)
            else:
                wait(dist.all_reduce(flat, op=_OPS[op], group=self._group, async_op=True))
                finish_average(flat, op, self.world_size)
            self._restore(host, tensor)
            return [tensor]

        return self._submit(f"all_reduce {op.name} of {_describe(tensor, codec)}", run, host)

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None
    ) -> Work:
        checks.check_reduce_scatter(output, input, op, codec, self.world_size)
        self._check_dtype(input)
        whole, part = self._host(input), self._host(output)

        def run() -> list[Tensor]:
            rows = whole.view(self.world_size, -1)
            result = torch.empty_like(rows[self.rank])  # `output` may be a part of `input`
            if codec is not None:
                encoded = torch.stack([_encoded(row, codec) for row in rows])
                received = torch.empty_like(encoded)
                wait(dist.all_to_all_single(received, encoded, group=self._group, async_op=True))
                _reduce_encoded(result, received, op, codec)
            else:
                reduce_scatter_flat(self._group, result, whole.view(-1), _OPS[op])
                finish_average(result, op, self.world_size)
            part.view(-1).copy_(result)
            self._restore(part, output)
            return [output]

        return self._submit(f"reduce_scatter {op.name} of {_describe(input, codec)}", run, whole)

    def all_gather(self, output: Tensor, input: Tensor, codec: Codec | None = None) -> Work:
        checks.check_all_gather(output, input, codec, self.world_size)
        whole, part = self._host(output), self._host(input)

        def run() -> list[Tensor]:
            if codec is not None:
                gathered = gather_bytes(self._group, _encoded(part.view(-1), codec), self.world_size)
                for row, data in zip(whole.view(self.world_size, -1), gathered, strict=True):
                    codec.decode(data, row)
            else:
                all_gather_flat(self._group, _as_bytes(whole), _as_bytes(part))
            self._restore(whole, output)
            return [output]

        return self._submit(f"all_gather of {_describe(input, codec)}", run, whole)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Work:
        checks.check_broadcast(tensor, src, self.world_size)
        host = self._host(tensor)

        def run() -> list[Tensor]:
            wait(dist.broadcast(_as_bytes(host), group_src=src, group=self._group, async_op=True))
            self._restore(host, tensor)
            return [tensor]

        return self._submit(f"broadcast from rank {src} of {_describe(tensor)}", run, host)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
    ) -> Work:
        incoming, outgoing = checks.check_all_to_all(output, input, output_rows, input_rows, self.world_size)
        received, sent = self._host(output), self._host(input)
        row_bytes = input.shape[1:].numel() * input.element_size()

        def run() -> list[Tensor]:
            self._all_to_all_bytes(
                _as_bytes(received),
                _as_bytes(sent),
                [rows * row_bytes for rows in incoming],
                [rows * row_bytes for rows in outgoing],
            )
            self._restore(received, output)
            return [output]

        says = f"all_to_all of {input.dtype} rows of {tuple(input.shape[1:])}"
        return self._submit(says, run, sent, rows=(incoming, outgoing))

    def all_to_all_ragged(self, inputs: Sequence[Tensor]) -> Work:
        checks.check_ragged(inputs, self.world_size)
        hosts = [self._staging.to_host(tensor.detach()) for tensor in inputs]
        dtype = inputs[0].dtype

        def run() -> list[Tensor]:
            shapes = [json.loads(part) for part in self._gather_ragged(_shapes(hosts))]
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

        return self._submit(f"all_to_all_ragged of {dtype}", run)

    def exchange(self, message: JsonValue, timeout: float | None = None) -> list[JsonValue]:
        encoded = checks.encode_message(message)
        messages: list[JsonValue] = []

        def run() -> list[Tensor]:
            messages.extend(json.loads(part) for part in self._gather_ragged(encoded))
            return []

        self._submit("exchange", run).wait(timeout)
        return messages

    def barrier(self, timeout: float | None = None) -> None:
        def run() -> list[Tensor]:
            if not self._verify:  # else the comparison of the calls has already waited for everybody
                gather_bytes(self._group, torch.zeros(1, dtype=torch.uint8), self.world_size)
            return []

        self._submit("barrier", run).wait(timeout)

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

        return self._submit_message("send", dst, tag, run, [tensor])

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

        return self._submit_message("recv", src, tag, run, [] if out is None else [out])

    # ---- life

    def split(self, ranks: Sequence[int], name: str) -> TorchCommunicator | None:
        members = checks.check_split(ranks, self.world_size)
        self._submit(f"split {name} of ranks {members}", lambda: []).wait()
        self._splits += 1
        if self.rank not in members:
            return None
        child = TorchCommunicator(
            # Numbered, so that a second group of this name does not meet the addresses of the first.
            dist.PrefixStore(f"{self._splits}.{name}", self._store),
            members.index(self.rank),
            len(members),
            backend=self._backend,
            timeout=self._timeout,
            verify=self._verify,
            name=f"{self._name}/{name}",
            staging=self._staging,
            telemetry=self.telemetry,
        )
        with self._lock:
            error = self._error
            self._children.append(child)
        if error is not None:
            child.abort(error)
        return child

    def abort(self, error: SmolError) -> None:
        """Fail what is pending and all that comes with `error`, here and in the groups split from this one.

        The connections are closed, so the peers' pending calls fail too, with PeerLost. From any thread.
        """
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            works, self._open_works = self._open_works, set()
            children = list(self._children)
        for work in works:
            work.finish(error)
        break_group(self._group, self.rank, self.world_size, self._backend)
        for child in children:
            child.abort(error)

    def close(self) -> None:
        """Wait up to CLOSE_TIMEOUT for the other ranks to close, then leave. Call on every rank; may be called again."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            is_idle = self._error is None and not self._open_works
            children = list(self._children)
        for child in children:
            child.close()
        if is_idle:
            goodbye = self._submit(_CLOSE, lambda: [])
            try:
                goodbye.wait(CLOSE_TIMEOUT)
            except SmolError:
                pass  # somebody is gone or still busy: what matters to us is done
        closed = ClusterError(f"rank {self.rank} has closed its communicator {self._name}: nothing can be called on it")
        if is_idle and goodbye.exception() is None and goodbye.done():
            with self._lock:
                self._error = self._error or closed
        else:
            self.abort(closed)
        for thread in [self._fifo, *self._lanes.values()]:
            thread.close(CLOSE_TIMEOUT)

    # ---- helpers

    def _submit(
        self,
        says: str,
        run: Callable[[], list[Tensor]],
        moved: Tensor | None = None,
        rows: tuple[list[int], list[int]] | None = None,
    ) -> PendingWork:
        """Queue a collective. `run` moves `moved` on the FIFO's thread; `rows`: from and to each rank, to be compared."""
        run = _on_side_stream(run, moved)

        def verified() -> list[Tensor]:
            if self._verify:
                self._compare(number, says, rows)
            return run()

        with self._lock:
            self._issued += 1
            number = self._issued
            work, job = self._job(says, verified, peer=-1)
            self._fifo.submit(job)
        return work

    def _submit_message(
        self, kind: str, peer: int, tag: int, run: Callable[[], list[Tensor]], results: list[Tensor]
    ) -> PendingWork:
        name = f"{kind} with tag {tag} {'to' if kind == 'send' else 'from'} rank {peer}"
        with self._lock:
            work, job = self._job(name, run, peer)
            lane = self._lanes.get((kind, peer, tag))
            if lane is None:
                lane = self._lanes[kind, peer, tag] = SerialThread(f"torch-dist rank {self.rank} {name}")
            lane.submit(job)
        return work

    def _job(self, what: str, run: Callable[[], list[Tensor]], peer: int) -> tuple[PendingWork, Callable[[], None]]:
        """A work, and the job that finishes it. The lock is held."""
        work = PendingWork(_Sleep(), lambda: f"{what} on rank {self.rank} of {self._name}", [])
        if self._error is None:
            self._open_works.add(work)

        def job() -> None:
            error = self._error
            results: list[Tensor] = []
            if error is None:
                try:
                    with torch.no_grad():
                        results = run()
                except CollectiveMismatch as exc:
                    error = exc
                    if peer < 0:  # a message that does not fit concerns nobody else
                        self.abort(exc)
                except SmolError as exc:
                    error = exc
                    self.abort(exc)
                except Exception as exc:  # noqa: BLE001 - top of the thread: stored in the work and in the communicator
                    error = self._error or translate(exc, what, peer)
                    self.abort(error)
            with self._lock:
                self._open_works.discard(work)
            work.finish(error, results)

        return work, job

    def _compare(self, number: int, says: str, rows: tuple[list[int], list[int]] | None) -> None:
        """Raise if the ranks are not about to do the same."""
        own = torch.zeros(_SAYS_BYTES + 8 * self.world_size, dtype=torch.uint8)
        text = says.encode()[:_SAYS_BYTES]
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if rows is not None:
            own[_SAYS_BYTES:] = torch.tensor(rows[1], dtype=torch.int64).view(torch.uint8)
        every = gather_bytes(self._group, own, self.world_size)
        said = [bytes(row[:_SAYS_BYTES].tolist()).rstrip(b"\0").decode(errors="replace") for row in every]
        where = f"ranks of {self._name} are out of step at call {number}"
        if any(other != said[0] for other in said):
            if _CLOSE in said and says != _CLOSE:
                gone = said.index(_CLOSE)
                raise PeerLost(f"{says}: rank {gone} has closed its communicator {self._name}", gone)
            listed = "; ".join(f"rank {rank} called {other}" for rank, other in enumerate(said))
            raise CollectiveMismatch(f"{where}: {listed}: every rank must call the same collectives in the same order")
        if rows is not None:
            sent = every[:, _SAYS_BYTES:].contiguous().view(torch.int64)  # (from, to)
            for dst in range(self.world_size):
                for src in range(self.world_size):
                    if dst == self.rank and int(sent[src, dst]) != rows[0][src]:
                        raise CollectiveMismatch(
                            f"{where}: rank {src} sends {int(sent[src, dst])} rows to rank {dst}, which expects "
                            f"{rows[0][src]}: output_rows must say what the others send"
                        )

    def _gather_ragged(self, own: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order; blocks."""
        sizes = gather_bytes(self._group, torch.tensor([len(own)]).view(torch.uint8), self.world_size)
        lengths = sizes.view(torch.int64).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        rows = gather_bytes(self._group, padded, self.world_size)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def _all_to_all_bytes(self, output: Tensor, input: Tensor, incoming: list[int], outgoing: list[int]) -> None:
        wait(dist.all_to_all_single(output, input, incoming, outgoing, group=self._group, async_op=True))

    def _host(self, tensor: Tensor) -> Tensor:
        """The tensor as the backend takes it: CUDA for NCCL as it is, else in host memory."""
        detached = tensor.detach()
        return detached if self._is_direct(detached) else self._staging.to_host(detached)

    def _restore(self, host: Tensor, tensor: Tensor) -> None:
        if host.device != tensor.device:
            self._staging.from_host(host, tensor.detach())

    def _is_direct(self, tensor: Tensor) -> bool:
        return self._backend == "nccl" and tensor.device.type == "cuda"

    def _check_dtype(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.int16:
            raise ValueError(f"{self._backend} cannot reduce int16 tensors: convert to int32 first")


class _Sleep:
    """The driver of works that another thread finishes: just wait."""

    def wait(self, finished: threading.Event, timeout: float | None) -> None:
        finished.wait(timeout)


def _on_side_stream(run: Callable[[], list[Tensor]], moved: Tensor | None) -> Callable[[], list[Tensor]]:
    """For CUDA tensors: run after what the caller has queued so far, beside what it queues later, and to the end."""
    if moved is None or moved.device.type != "cuda":
        return run
    device = moved.device
    ready = torch.cuda.current_stream(device).record_event()

    def run_on_side_stream() -> list[Tensor]:
        side = torch.cuda.Stream(device)
        side.wait_event(ready)
        with torch.cuda.stream(side):
            results = run()
        side.synchronize()
        return results

    return run_on_side_stream


def _encoded(flat: Tensor, codec: Codec) -> Tensor:
    out = torch.empty(codec.encoded_nbytes(flat.numel()), dtype=torch.uint8, device=flat.device)
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


def _describe(tensor: Tensor, codec: Codec | None = None) -> str:
    encoded = "" if codec is None else f" as {codec.name}"
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}{encoded}"
