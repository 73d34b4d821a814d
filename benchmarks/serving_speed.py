"""How fast a GPT-2 of 124 M parameters writes through the whole engine, beside transformers' `generate` and itself.

    python benchmarks/serving_speed.py                 every comparison, 7 blocks of each side
    python benchmarks/serving_speed.py int8 stages     only these
    python benchmarks/serving_speed.py --model FOLDER  another model

generate   one stream: transformers with its cache, ours in fp32, int8 and dynamic int8
stages     one stream: one process, two stages of this machine; what a hop takes beyond computing, and what a plain
           socket takes for as many bytes between two processes that compute as long
streams    eight streams: one process, two stages; and what the slower stage allows, alone and while the other computes
replicas   two replicas, each with as many streams as one process has alone
memory     bytes per second that one core reads, and the share of it that one stream gets (no blocks)

Sides take turns in blocks; a ratio is the median of those of blocks that follow each other, with its 95 % interval. One
thread in every process. Weights are random: only their sizes matter here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe, save

from smolcluster.bench.generate import Options, transformers_side, write_all
from smolcluster.bench.intervals import bootstrap_interval
from smolcluster.config.schema import ServingConfig
from smolcluster.device import prepare_process
from smolcluster.models.decoder import Segment
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout, plan_layers
from smolcluster.serving.layer_store import CacheSize, LayerStore, Machine
from smolcluster.serving.replica import Observer
from smolcluster.serving.service import Service

PROMPT, TOKENS, STREAMS = 32, 64, 8
Side = Callable[[], float]  # tokens per second of one block


class Hops(Observer):
    """Keeps what hops take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def hopped(self, seconds: float) -> None:
        """See Observer."""
        self.seconds.append(seconds)


def main() -> None:
    """Measure, print, save."""
    parts = {"generate": generate, "stages": stages, "streams": streams, "replicas": replicas, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--model", help="a folder. Default: a random GPT-2 of 124 M parameters")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--name", default="serving_speed", help="of the result")
    arguments = parser.parse_args()
    prepare_process()
    file = RESULTS / f"{arguments.name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with contextlib.ExitStack() as stack:
        model = arguments.model or gpt2_124m(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in arguments.parts or parts:
            found[name] = {**parts[name](model, arguments.blocks), "commit": describe()["commit"]}
            print(name, json.dumps(found[name], indent=2), flush=True)
            found.pop("measured", None)
            save(arguments.name, found)


def gpt2_124m(folder: str) -> str:
    """Write a random one."""
    import transformers

    from smolcluster.data.tokenizer import ByteTokenizer

    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    ByteTokenizer().save(Path(folder))
    return folder


# ---- parts


def generate(model: str, blocks: int) -> dict[str, Any]:
    """One stream, against transformers."""
    with contextlib.ExitStack() as stack:
        sides = {
            dtype: stack.enter_context(service_side(model, 1, dtype=dtype))
            for dtype in ("fp32", "int8", "int8-dynamic")
        }
        theirs = transformers_side(model, Options(prompt=PROMPT, tokens=TOKENS))
        sides["transformers"] = lambda: timed(lambda: theirs(texts(1)), 1)
        pairs = [(dtype, "transformers") for dtype in ("fp32", "int8", "int8-dynamic")]
        return compare(sides, [*pairs, ("int8", "fp32"), ("int8-dynamic", "fp32")], blocks)


def stages(model: str, blocks: int) -> dict[str, Any]:
    """One stream over two stages."""
    hops = Hops()
    with service_side(model, 1) as one, service_side(model, 1, layout=Layout(processes=2), observer=hops) as two:
        found = compare({"two stages": two, "one process": one}, [("two stages", "one process")], blocks)
    links = link_seconds(4 * LayerStore(Path(model)).config.model_dim + 200, 64 * blocks)
    hop, link = (quantiles_us(each) for each in (hops.seconds, links))
    return {**found, "hop_us": hop, "link_us": link, "hop_beyond_link_us": hop["median"] - link["median"]}


def quantiles_us(seconds: Sequence[float]) -> dict[str, int]:
    """Median and 95 %, in microseconds."""
    cut = statistics.quantiles(seconds, n=20)
    return {"median": round(1e6 * cut[9]), "p95": round(1e6 * cut[18]), "count": len(seconds)}


_ECHO = """
import socket, sys, time, torch
torch.set_num_threads(1)
numbers, there = torch.ones(int(sys.argv[3])), socket.create_connection(("127.0.0.1", int(sys.argv[1])))
there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while there.recv(int(sys.argv[2]), socket.MSG_WAITALL):
    began = time.perf_counter()
    numbers.sum().item()
    there.sendall(f"{time.perf_counter() - began:15.9f}".encode())
"""


def link_seconds(count: int, rounds: int) -> list[float]:
    """From one process to another with a plain socket; each reads 200 MB before it sends. Half of what is left."""
    numbers, listener = torch.ones(50_000_000), socket.create_server(("127.0.0.1", 0))
    arguments = [str(listener.getsockname()[1]), str(count), str(len(numbers))]
    found = []
    with subprocess.Popen([sys.executable, "-c", _ECHO, *arguments]) as child, listener:
        there, _ = listener.accept()
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with there:
            for _ in range(rounds):
                numbers.sum().item()
                began = time.perf_counter()
                there.sendall(bytes(count))
                computed = float(there.recv(15, socket.MSG_WAITALL))
                found.append((time.perf_counter() - began - computed) / 2)
        child.wait(20)
    return found[rounds // 8 :]


def streams(model: str, blocks: int) -> dict[str, Any]:
    """Eight streams over two stages."""
    store = LayerStore(Path(model))
    size = CacheSize(STREAMS, PROMPT + TOKENS)
    split = plan_layers(store, size, [Machine(), Machine()])
    group = STREAMS // 2
    times = [stage_seconds(store, layers, size, group) for layers in split]
    both = stages_at_once(store, split, size, group)
    layout = Layout(processes=2)
    with service_side(model, STREAMS) as one, service_side(model, STREAMS, layout=layout) as two:
        found = compare({"two stages": two, "one process": one}, [("two stages", "one process")], blocks)
    rate = found["tokens_per_s"]["two stages"]
    allowed = {"alone": group / max(times), "while the other computes": group / max(both)}
    return {
        **found,
        "split": [[layers.start, layers.stop] for layers in split],
        "stage_ms": {
            "alone": [round(1e3 * each, 2) for each in times],
            "both": [round(1e3 * each, 2) for each in both],
        },
        "slower_stage_allows": {name: round(value, 1) for name, value in allowed.items()},
        "share_of_that": {name: round(rate / value, 3) for name, value in allowed.items()},
    }


def replicas(model: str, blocks: int) -> dict[str, Any]:
    """Twice as many streams over two replicas."""
    found: dict[str, Any] = {}
    for each in (1, 4):
        layout = Layout("dp", 2)
        with service_side(model, each) as one, service_side(model, each, layout=layout, requests=2 * each) as two:
            sides = {"two replicas": two, "one": one}
            found[f"{each} streams each"] = compare(sides, [("two replicas", "one")], blocks)
    return found


def memory(model: str, blocks: int) -> dict[str, Any]:
    """Of one core; a token of one stream reads every weight once."""
    numbers = torch.ones(64 << 20)  # 256 MiB
    rates = []
    for _ in range(3 * blocks):
        began = time.perf_counter()
        numbers.sum().item()
        rates.append(numbers.nbytes / (time.perf_counter() - began))
    found: dict[str, Any] = {"read_gb_per_s": round(statistics.median(rates) / 1e9, 2)}
    for dtype in ("fp32", "int8", "int8-dynamic"):
        read = sum(cost.read for cost in LayerStore(Path(model), dtype).costs(CacheSize(1, PROMPT + TOKENS)))
        with service_side(model, 1, dtype=dtype) as side:
            side()
            rate = statistics.median(side() for _ in range(blocks))
        found[dtype] = {"mb_per_token": round(read / 1e6, 1), "share": round(rate * read / statistics.median(rates), 3)}
    return found


# ---- sides


@contextlib.contextmanager
def service_side(
    model: str, streams: int, *, dtype: str = "fp32", layout: Layout | None = None, observer: Observer | None = None,
    requests: int | None = None,
) -> Iterator[Side]:  # fmt: skip
    """As many requests at once as a replica has slots, or as told."""
    settings = ServingConfig(max_concurrent=streams, ctx_length=PROMPT + TOKENS)
    service: Service = make_service(model, settings, dtype=dtype, layout=layout, observer=observer)
    count = requests or streams
    try:
        yield lambda: timed(lambda: write_all(service.engine, texts(count), TOKENS), count)
    finally:
        service.close()


def texts(count: int) -> torch.Tensor:
    """Other ones each time: nothing is to be found in a cache."""
    return torch.randint(50_000, (count, PROMPT))


def timed(call: Callable[[], object], streams: int) -> float:
    """Tokens per second."""
    began = time.perf_counter()
    call()
    return streams * TOKENS / (time.perf_counter() - began)


def compare(sides: dict[str, Side], pairs: Sequence[tuple[str, str]], blocks: int) -> dict[str, Any]:
    """Blocks in turn; the first of each side is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(-1, blocks):
        for name in list(sides)[:: 1 if block % 2 else -1]:
            rate = sides[name]()
            if block >= 0:
                rates[name].append(rate)
    ratios: dict[str, Any] = {}
    for ours, other in pairs:
        each = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        low, high = bootstrap_interval(each, statistics.median)
        ratios[f"{ours} / {other}"] = {
            "median": round(statistics.median(each), 3), "low": round(low, 3), "high": round(high, 3)
        }  # fmt: skip
    medians = {name: round(statistics.median(each), 2) for name, each in rates.items()}
    return {"blocks": blocks, "tokens_per_s": medians, "ratios": ratios}


# ---- one stage by itself


def stage_seconds(store: LayerStore, layers: range, size: CacheSize, rows: int, steps: int = 40) -> float:
    """Of one step of a stage with a token of each of `rows` streams: the median."""
    decoder = store.decoder(layers, size)
    x = torch.randint(50_000, (rows,)) if layers.start == 0 else torch.randn(rows, store.config.model_dim)
    wanted = list(range(rows)) if layers.stop == store.layers else []
    taken = []
    for step in range(steps):
        segments = [Segment(slot, PROMPT + step % TOKENS, 1) for slot in range(rows)]
        began = time.perf_counter()
        decoder(x, segments, wanted)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[steps // 4 :])


def stages_at_once(store: LayerStore, split: Sequence[range], size: CacheSize, rows: int) -> list[float]:
    """The same while both compute, each on a core of its own and without a word to the other."""
    found: dict[int, float] = {}
    gate = threading.Barrier(2)

    def run(number: int, own: LayerStore) -> None:
        stage_seconds(own, split[number], size, rows, 4)
        gate.wait()
        found[number] = stage_seconds(own, split[number], size, rows, 120)

    # Products release Python's lock; what is left of it costs both a little, as a process each would not.
    threads = [threading.Thread(target=run, args=(n, LayerStore(store.folder))) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


if __name__ == "__main__":
    main()
