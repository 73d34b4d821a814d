"""All-reduce, ours against gloo's: alternating, in the same processes, every result checked.

Each rank is a process that holds both: our communicator over real TCP with token and frames, and a gloo process group.
A block is some calls of one of them in a row; its time is that of the slowest rank. The blocks alternate.

A block is one or more rows. Before each the tensor is filled anew: rank r holds (r+1) times a pattern of small
integers. After the row every element must be N^(calls-1) times their sum, within the rounding of so many additions (or
of the compression).

    python -m smolcluster.bench.all_reduce     one rank; see ranks.py
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from smolcluster.bench.ranks import largest, meet, read_job, run_ranks, say
from smolcluster.errors import ClusterError, ConfigError
from smolcluster.kinds import JsonObject, JsonValue

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RUNS = 9
# A block takes about so long: short enough that both competitors see the same weather, long enough that the moods of
# the scheduler, of some 10 ms each, even out.
BLOCK_SECONDS = 0.1
# A call that takes so long is a block by itself.
SLOW_SECONDS = 0.2
# Fillings of a block, each of which is checked.
MAX_ROWS = 10
# On one filling the values may grow by so many bits, which is nearly all of float32's range, and a compression may
# round them so often: more would hide a mistake.
MAX_GROWTH_BITS = 100
MAX_LOSSY_CALLS = 12
PATTERN = 61  # a prime, so that no chunk or block begins like another


COMPRESSIONS = ("none", "bf16", "fp16", "int8")
DTYPES = ("float32", "float64", "float16", "bfloat16")
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
MAX_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        sizes: bytes of the tensors.
        against: "gloo"; None: we are measured alone.
        compression: of our bytes.
        dtype: of the tensors.
        congestion: "equal" gives gloo's sockets the congestion control of ours, "default" leaves them alone.
        link: "tcp" or "shm".
        runs: blocks of each side.
        interface: a network interface of rank 0's host (Linux), whose sent bytes are counted; None: no bytes are.
    """

    sizes: Sequence[int]
    against: str | None = "gloo"
    compression: str = "none"
    dtype: str = "float32"
    congestion: str = "equal"
    link: str = "tcp"
    runs: int = RUNS
    interface: str | None = None


def bench_all_reduce(
    world_size: int,
    options: Options,
    *,
    hosts: Sequence[str] | None = None,
    prefix: Callable[[int], Sequence[str]] = lambda rank: (),
) -> list[JsonObject]:
    """Measure; blocks.

    Args:
        world_size: ranks, each a process.
        options: what to measure.
        hosts: where each rank listens; None: loopback.
        prefix: see run_ranks.

    Returns:
        One object for each size: `bytes world tcp_ms gloo_ms ratio`, and how far the runs spread.

    Raises:
        ConfigError: there is no such competitor, compression, type or link.
        ClusterError: a rank failed, or a result was wrong.
    """
    _check(world_size, options)
    job = cast("JsonObject", {**asdict(options), "sizes": list(options.sizes)})
    results = run_ranks("smolcluster.bench.all_reduce", world_size, job, hosts=hosts, prefix=prefix)
    return cast("list[JsonObject]", results[0]["rows"])


def parse_sizes(text: str) -> list[int]:
    """Bytes of `4KiB,1MiB`.

    Raises:
        ConfigError: it is written in another way, or too large.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([KMG]i)?B?\s*", part)
        nbytes = int(match[1]) * UNITS[f"{match[2] or ''}B"] if match else 0
        if not 0 < nbytes <= MAX_BYTES:
            raise ConfigError(f"--sizes: {part.strip()!r} is not a size. Write 4KiB, 256KiB or 64MiB, up to 4GiB")
        sizes.append(nbytes)
    return sizes


def _check(world_size: int, options: Options) -> None:
    choices = {
        "against": (options.against, (None, "gloo")),
        "compression": (options.compression, COMPRESSIONS),
        "dtype": (options.dtype, DTYPES),
        "link": (options.link, ("tcp", "shm")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"--{name} {value} is unknown. Use {' or '.join(str(one) for one in known if one)}")
    if not 2 <= world_size <= 64:
        raise ConfigError(f"--world {world_size}: give a number of ranks from 2 to 64")


def main() -> None:
    """One rank."""
    job = read_job()
    import torch
    import torch.distributed as dist

    from smolcluster.bench.congestion import equalise
    from smolcluster.collectives.codec import ErrorFeedback, Int8Codec, codec_for
    from smolcluster.device import prepare_process

    prepare_process()
    rank, world_size = cast("int", job["rank"]), cast("int", job["world_size"])
    comm = meet(job, shared_memory=job["link"] == "shm")
    codec = codec_for(str(job["compression"]))
    feedback: dict[int, ErrorFeedback] = {}  # by the tensor's elements: as for gradients, with all that it costs

    def forget() -> None:  # a new filling has nothing to do with what the one before it has lost
        for kept in feedback.values():
            kept.residual.zero_()

    against = job["against"] == "gloo"
    if against:
        dist.init_process_group("gloo", init_method=str(job["meeting"]), rank=rank, world_size=world_size)
        dist.barrier()
    congestion = equalise() if job["congestion"] == "equal" else "each its own"
    dtype = cast("torch.dtype", getattr(torch, str(job["dtype"])))

    def ours(tensor: Tensor) -> None:
        if isinstance(codec, Int8Codec):
            if tensor.numel() not in feedback:
                feedback[tensor.numel()] = ErrorFeedback(codec, torch.zeros_like(tensor))
            comm.all_reduce(tensor, codec=feedback[tensor.numel()]).wait()
        else:
            comm.all_reduce(tensor, codec=codec).wait()

    def gloo(tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    rows: list[JsonObject] = []
    for nbytes in cast("list[int]", job["sizes"]):
        tensor = torch.zeros(max(1, nbytes // dtype.itemsize), dtype=dtype)
        block = _Block(tensor, rank, world_size, codec=str(job["compression"]), refilled=forget, sync=comm.barrier)
        times: dict[str, list[float]] = {"tcp": [], "gloo": []}
        competitors = {"tcp": ours, "gloo": gloo} if against else {"tcp": ours}
        calls = {}
        for name, call in competitors.items():  # warm up, and see how many calls make a block
            block.seconds(call, [2])
            calls[name] = block.fitting_calls(largest(comm, block.seconds(call, [2])))
        sent = 0
        for run in range(cast("int", job["runs"])):
            for name in list(competitors)[:: 1 if run % 2 == 0 else -1]:
                before = _sent_bytes(job["interface"])
                times[name].append(largest(comm, block.seconds(competitors[name], calls[name])) * 1e3)
                sent += (_sent_bytes(job["interface"]) - before) if name == "tcp" else 0
        row = {**_row(tensor.nbytes, world_size, times), "congestion": congestion, "link": job["link"]}
        if job["interface"] is not None:
            row["sent_bytes"] = sent / (sum(calls["tcp"]) * len(times["tcp"]))
        rows.append(row)
    comm.barrier()
    if against:
        dist.destroy_process_group()
    comm.close()
    say({"rows": cast("JsonValue", rows)})


def _sent_bytes(interface: JsonValue) -> int:
    if interface is None:
        return 0
    return int((Path("/sys/class/net") / str(interface) / "statistics" / "tx_bytes").read_text())


class _Block:
    """Some calls in a row on one tensor."""

    def __init__(
        self,
        tensor: Tensor,
        rank: int,
        world_size: int,
        *,
        codec: str = "none",
        refilled: Callable[[], object] = lambda: None,
        sync: Callable[[], object],
    ) -> None:
        import torch

        from smolcluster.collectives.codec import FP16_MAX

        self._tensor = tensor
        self._world_size = world_size
        self._refilled = refilled
        self._sync = sync
        ramp = (torch.arange(tensor.numel()) % PATTERN - PATTERN // 2).to(tensor.dtype)
        self._own = ramp * (rank + 1)
        self._sum = ramp * (world_size * (world_size + 1) // 2)
        largest = PATTERN // 2 * world_size * (world_size + 1) / 2
        # Of the largest value, in one call: a compression rounds contributions and sum by 1/254 or less, and what it
        # lost in the call before comes on top.
        self._tolerance = largest * (2.0**-6 if codec != "none" else 4 * torch.finfo(tensor.dtype).eps * world_size)
        end = FP16_MAX if codec == "fp16" else torch.finfo(tensor.dtype).max
        bits = max(0.0, min(MAX_GROWTH_BITS, math.log2(end / largest)))
        self._max_calls = 1 + int(bits / math.log2(world_size))
        if codec != "none":
            self._max_calls = min(self._max_calls, MAX_LOSSY_CALLS)

    def fitting_calls(self, seconds: float) -> list[int]:
        """How many calls make a block, if one takes `seconds`: so many in a row, and again on a new filling."""
        calls = max(3 if seconds < SLOW_SECONDS else 1, int(BLOCK_SECONDS / seconds))
        rows = min(MAX_ROWS, -(-calls // self._max_calls))
        return [min(self._max_calls, -(-calls // rows))] * rows

    def seconds(self, call: Callable[[Tensor], None], calls: Sequence[int]) -> float:
        """Time of one call, the mean of rows of `calls`.

        Raises:
            ClusterError: the result is wrong.
        """
        return sum(self._row_seconds(call, count) for count in calls) / sum(calls)

    def _row_seconds(self, call: Callable[[Tensor], None], calls: int) -> float:
        self._tensor.copy_(self._own)
        self._refilled()
        self._sync()
        start = time.perf_counter()
        for _ in range(calls):
            call(self._tensor)
        seconds = time.perf_counter() - start
        growth = float(self._world_size) ** (calls - 1)
        worst = float((self._tensor / growth - self._sum).abs().max())
        allowed = calls * self._tolerance
        if not worst <= allowed:
            raise ClusterError(f"a wrong sum after {calls} calls: off by {worst:g} where {allowed:g} is rounding")
        return seconds


def _row(nbytes: int, world_size: int, times: dict[str, list[float]]) -> JsonObject:
    ours, gloo = times["tcp"], times["gloo"]
    row: JsonObject = {
        "bytes": nbytes,
        "world": world_size,
        "tcp_ms": statistics.median(ours),
        "gloo_ms": statistics.median(gloo) if gloo else None,
        "ratio": statistics.median(gloo) / statistics.median(ours) if gloo else None,
        "tcp_ms_range": [min(ours), max(ours)],
        "runs": len(ours),
    }
    if gloo:
        ratios = [theirs / mine for theirs, mine in zip(gloo, ours, strict=True)]
        row |= {"gloo_ms_range": [min(gloo), max(gloo)], "ratio_range": [min(ratios), max(ratios)]}
    return row


if __name__ == "__main__":
    main()
