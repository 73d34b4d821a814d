"""What an all-reduce on this machine needs at least: the copies that nobody can leave out, in bare loops.

    python benchmarks/floor.py

Over loopback TCP the kernel copies every byte twice, into a socket and out of it. One process sends from memory that no
cache holds, another receives into such memory; their processor time per GiB is what a byte costs, whoever sends it. A
ring all-reduce of S bytes and N ranks sends and receives 2(N-1)/N * S on each of them and adds (N-1)/N * S, and as many
ranks as share a core share its time. No protocol, no interpreter, no scheduling: what is measured cannot be less.

Through shared memory each of two ranks copies its S bytes to where the other sees them, and adds the other's: two
passes over memory, block by block, in step with each other. Nothing else is done in the loop.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import save

MIB = 1 << 20
BYTES = 64 * MIB
SENT = 1024 * MIB
CALL_BYTES = 256 << 10  # the cheapest of 112 KiB to 4 MiB
BLOCK, SLOTS = 512 << 10, 8
RUNS = 9


def in_two_processes(part: Callable[[int], float]) -> tuple[float, float]:
    """part(0) here and part(1) in a fork, at the same time; what both return."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(part(1)).encode())
        os._exit(0)
    mine = part(0)
    os.waitpid(pid, 0)
    theirs = float(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return mine, theirs


def kernel_copies() -> tuple[float, float]:
    """Processor seconds of sending and of receiving 1 GiB over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def part(index: int) -> float:
            memory = memoryview(bytearray(BYTES))
            sock = socket.create_connection(server.getsockname()) if index == 0 else server.accept()[0]
            with sock:
                if hasattr(socket, "TCP_CONGESTION"):  # what both sides of all_reduce.py have
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
                before, done = time.process_time(), 0
                while done < SENT:
                    place = memory[done % BYTES : done % BYTES + CALL_BYTES]
                    count = sock.send(place) if index == 0 else sock.recv_into(place)
                    if count == 0:
                        break
                    done += count
                return time.process_time() - before

        return in_two_processes(part)


def adding() -> float:
    """Processor seconds of adding 1 GiB that the cache has to numbers that it has not."""
    numbers, block = torch.ones(BYTES // 4), torch.ones(BLOCK // 4)
    before = time.process_time()
    for part in torch.split(numbers, BLOCK // 4):
        part.add_(block)
    return (time.process_time() - before) * (1024 * MIB / BYTES)


def two_passes() -> float:
    """Seconds of an all-reduce of BYTES through shared memory, by two processes."""
    memory = mmap.mmap(-1, 4096 + 2 * SLOTS * BLOCK)
    counts = np.frombuffer(memory, dtype=np.int64, count=512)
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=4096).view(torch.float32)
    rings = [torch.split(ring, BLOCK // 4) for ring in torch.split(data, SLOTS * BLOCK // 4)]

    def part(rank: int) -> float:
        blocks = torch.split(torch.ones(BYTES // 4), BLOCK // 4)
        mine, theirs, done = 64 * rank, 64 * (1 - rank), 0
        times = []
        for _ in range(RUNS):
            counts[mine + 1] += 1
            while counts[theirs + 1] < counts[mine + 1]:
                pass
            begin = time.perf_counter()
            for block in blocks:
                rings[rank][done % SLOTS].copy_(block)
                done += 1
                counts[mine] = done
                while counts[theirs] < done:
                    pass
                block.add_(rings[1 - rank][(done - 1) % SLOTS])
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    return max(in_two_processes(part))


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, rounded."""
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def main() -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for _ in range(RUNS):
        send, receive = kernel_copies()
        add = adding()
        note("send_ms_per_gib", send * 1e3)
        note("receive_ms_per_gib", receive * 1e3)
        note("add_ms_per_gib", add * 1e3)
        for world in (2, 4):
            share = (world - 1) / world * BYTES / (1024 * MIB)
            per_rank = (2 * share * (send + receive) + share * add) * 1e3
            note(f"tcp_world_{world}_ms", per_rank * max(1.0, world / cores))
        note("shared_memory_world_2_ms", two_passes() * 1e3)
    figures = {name: spread(values) for name, values in samples.items()}
    print(json.dumps(figures, indent=2))
    save("floor", {"bytes": BYTES, "cores": cores, "runs": RUNS, **figures})


if __name__ == "__main__":
    main()
