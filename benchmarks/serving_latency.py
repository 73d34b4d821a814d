"""What those who read along notice of a slow link, of a long history and of somebody else's long prompt.

    python benchmarks/serving_latency.py prefix prompt         a random GPT-2 of 124 M parameters
    python benchmarks/serving_latency.py --netlab PATH link    needs root; `netlab up N RATE ONE_WAY_MS` makes the hosts
    python benchmarks/serving_latency.py --model FOLDER prompt another model

link     two stages, 50 ms there and back between their hosts (network namespaces), a `smolcluster serve --cluster` on
         each, asked over HTTP: tokens per second of eight streams and of one, in turn
prefix   a conversation of 300 tokens goes on: time to the first token if its keys and values are still there, and if
         they are not, in turn; in one process and over two stages
prompt   four streams write, then a prompt of 400 tokens comes, too: the times between two tokens of the four until it
         has its first one, and before it came; in one process and over two stages

One thread in every process. Weights are random, unless a folder is given: only their sizes matter here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
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
from serving_speed import gpt2_124m

from smolcluster.bench.intervals import bootstrap_interval
from smolcluster.config.schema import ServingConfig
from smolcluster.device import prepare_process
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout
from smolcluster.serving.requests import Event, Request
from smolcluster.serving.sampling import Sampling
from smolcluster.serving.service import Service

STREAMS, TOKENS = 8, 64
HISTORY, QUESTION, PROMPT = 300, 16, 400
WRITERS = 4
ROUND_TRIP_MS = 50.0
LAYOUTS = {"one process": None, "two stages": Layout(processes=2)}


def main() -> None:
    """Measure, print, save."""
    parts = {"prefix": prefix, "prompt": prompt}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="link, prefix, prompt")
    parser.add_argument("--model", help="a folder. Default: a random GPT-2 of 124 M parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--netlab", type=Path, help="the script that makes hosts, for `link`")
    parser.add_argument("--within", help=argparse.SUPPRESS)  # `link`, on the first host; the second one's namespace
    parser.add_argument("--name", default="serving_latency", help="of the result")
    arguments = parser.parse_args()
    prepare_process()
    if arguments.within is not None:
        print(json.dumps(link_within(arguments.model, arguments.rounds, arguments.within)))
        return
    file = RESULTS / f"{arguments.name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with contextlib.ExitStack() as stack:
        model = arguments.model or gpt2_124m(stack.enter_context(tempfile.TemporaryDirectory()))
        label = Path(arguments.model).name if arguments.model else "gpt2-124m"
        for name in arguments.parts or ["prefix", "prompt"]:
            if name == "link":
                result = link(model, arguments.rounds, arguments.netlab)
            else:
                result = parts[name](model, arguments.rounds)
            found.setdefault(name, {})[label] = {**result, "commit": describe()["commit"]}
            print(name, label, json.dumps(result, indent=2), flush=True)
            found.pop("measured", None)
            save(arguments.name, found)


# ---- a slow link


def link(model: str, rounds: int, netlab: Path | None) -> dict[str, Any]:
    """Two hosts, and this script on the first."""
    if netlab is None:
        raise SystemExit("link needs --netlab PATH")
    prefix_of = f"lat{os.getpid()}x"
    environment = {**os.environ, "NETLAB_PREFIX": prefix_of}
    subprocess.run([netlab, "up", "2", "1gbit", str(ROUND_TRIP_MS / 2)], check=True, env=environment)
    try:
        within = ["--within", f"{prefix_of}2", "--model", model, "--rounds", str(rounds)]
        command = ["ip", "netns", "exec", f"{prefix_of}1", sys.executable, __file__, *within]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=1800)
        if done.returncode:
            raise SystemExit(f"link failed:\n{done.stdout}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        subprocess.run([netlab, "down"], check=True, env=environment)


def link_within(model: str, rounds: int, other: str) -> dict[str, Any]:
    """On the first host."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cluster, token = Path(folder, "cluster.yaml"), Path(folder, "token")
        hosts = {"server": "first", "host_ip": {"first": "198.18.0.1", "second": "198.18.0.2"}, "port": 7000}
        settings = {"max_concurrent": STREAMS, "ctx_length": 256}
        cluster.write_text(json.dumps({**hosts, "serving": settings, "web_interface": {"api_port": 8080}}))
        smolcluster = [sys.executable, "-m", "smolcluster"]
        subprocess.run([*smolcluster, "token", "new", "--file", str(token)], check=True, stdout=subprocess.DEVNULL)
        serve = [*smolcluster, "serve", "--cluster", str(cluster), "--model", model, "--dtype", "fp32"]
        serve += ["--token-file", str(token)]
        node = ["ip", "netns", "exec", other, *serve, "--hostname", "second"]
        for number, command in enumerate((serve, node)):
            stack.enter_context(running(command, Path(folder, f"log{number}")))
        vocab_size = json.loads(Path(model, "config.json").read_text())["vocab_size"]
        wait_until_served(Path(folder, "log0"))
        rates: dict[int, list[float]] = {1: [], STREAMS: []}
        for number in range(-1, rounds):
            for streams in rates:
                rate = rate_over_http(8080, Path(model).name, vocab_size, streams)
                if number >= 0:
                    rates[streams].append(rate)
        round_trips = [connect_ms("198.18.0.2", 7000) for _ in range(5)]
    ratios = [eight / one for one, eight in zip(rates[1], rates[STREAMS], strict=True)]
    return {
        "round_trip_ms": round(statistics.median(round_trips), 1),
        "tokens_per_s": {f"{n} streams": round(statistics.median(each), 2) for n, each in rates.items()},
        "eight / one": spread(ratios),
        "rounds": rounds,
    }


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[None]:
    """A process, until SIGTERM."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_served(log: Path) -> None:
    """Until the controller answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(8080, "GET", "/health")[0] == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"nothing is served:\n{log.read_text()}")


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def rate_over_http(port: int, model: str, vocab_size: int, streams: int) -> float:
    """Tokens per second of so many requests at once."""
    prompts = torch.randint(3, vocab_size, (streams, 16)).tolist()

    def write(text: list[int]) -> int:
        body = {"model": model, "prompt": text, "max_tokens": TOKENS, "temperature": 0}
        status, answer = ask(port, "POST", "/v1/completions", body)
        if status != 200:
            raise SystemExit(f"status {status}: {answer}")
        return int(answer["usage"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        began = time.perf_counter()
        count = sum(pool.map(write, prompts))
        return count / (time.perf_counter() - began)


def connect_ms(host: str, port: int) -> float:
    """A round trip: a connection is there, or refused."""
    began = time.perf_counter()
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((host, port), 5).close()
    return 1e3 * (time.perf_counter() - began)


# ---- a long history, and a long prompt


class Reader:
    """An answer: when each of its tokens came."""

    def __init__(self, service: Service, prompt: Sequence[int], tokens: int, on_token: Callable[[], None]) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._on_token = on_token
        self.ended = threading.Event()
        self.error: str | None = None
        self.asked = time.perf_counter()
        service.engine.submit(Request(prompt, tokens, Sampling(temperature=0.0)), self._take)

    def _take(self, event: Event) -> None:
        if event.token is not None:
            self.times.append(time.perf_counter())
            self.tokens.append(event.token.token)
            self._on_token()
        if event.finish_reason is not None:
            self.error = event.error
            self.ended.set()

    def wait(self) -> Reader:
        """To its end."""
        if not self.ended.wait(600) or self.error is not None:
            raise SystemExit(f"an answer failed: {self.error}")
        return self


def prefix(model: str, rounds: int) -> dict[str, Any]:
    """With the history's keys and values, and without."""
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        settings = ServingConfig(max_concurrent=2, ctx_length=HISTORY + 2 * QUESTION + 8)
        service = make_service(model, settings, dtype="fp32", layout=layout)
        with contextlib.closing(service):
            first: dict[str, list[float]] = {"cold": [], "kept": []}
            for number in range(-1, rounds):
                history = torch.randint(3, service.vocab_size, (HISTORY,)).tolist()
                begun = Reader(service, history, QUESTION, lambda: None).wait()
                question = torch.randint(3, service.vocab_size, (QUESTION,)).tolist()
                other = torch.randint(3, service.vocab_size, (HISTORY + QUESTION,)).tolist()
                sides = {"kept": [*history, *begun.tokens, *question], "cold": [*other, *question]}
                for side in list(sides)[:: 1 if number % 2 else -1]:
                    reader = Reader(service, sides[side], 2, lambda: None).wait()
                    if number >= 0:
                        first[side].append(reader.times[0] - reader.asked)
        ratios = [cold / kept for cold, kept in zip(first["cold"], first["kept"], strict=True)]
        found[name] = {
            "first_token_ms": {side: round(1e3 * statistics.median(each), 1) for side, each in first.items()},
            "cold / kept": spread(ratios),
            "rounds": rounds,
        }
    return found


def prompt(model: str, rounds: int) -> dict[str, Any]:
    """Gaps of those who write."""
    return {name: gaps(model, layout, rounds) for name, layout in LAYOUTS.items()}


def gaps(model: str, layout: Layout | None, rounds: int) -> dict[str, Any]:
    """Before a long prompt comes, and while it is computed."""
    settings = ServingConfig(max_concurrent=WRITERS + 1, ctx_length=PROMPT + 8)
    calm: list[float] = []
    disturbed: list[float] = []
    first: list[float] = []
    service = make_service(model, settings, dtype="fp32", layout=layout)
    with contextlib.closing(service):
        for number in range(-1, rounds):
            is_calm, gone = threading.Event(), [0]

            def count(is_calm: threading.Event = is_calm, gone: list[int] = gone) -> None:
                gone[0] += 1
                if gone[0] >= WRITERS * 60:
                    is_calm.set()

            texts = torch.randint(3, service.vocab_size, (WRITERS, 32)).tolist()
            writers = [Reader(service, text, 200, count) for text in texts]
            is_calm.wait(300)
            long_one = torch.randint(3, service.vocab_size, (PROMPT,)).tolist()
            late = Reader(service, long_one, 2, lambda: None).wait()
            for writer in writers:
                writer.wait()
            if number < 0:
                continue
            first.append(late.times[0] - late.asked)
            for writer in writers:
                began = max(each.times[0] for each in writers)
                for before, after in zip(writer.times, writer.times[1:], strict=False):
                    if before > began and after < late.asked:
                        calm.append(after - before)
                    elif after > late.asked and before < late.times[0]:
                        disturbed.append(after - before)
    p50, p99 = statistics.median(calm), statistics.quantiles(disturbed, n=100)[98]
    return {
        "calm_ms": {"p50": round(1e3 * p50, 1), "p99": round(1e3 * statistics.quantiles(calm, n=100)[98], 1)},
        "disturbed_ms": {"p50": round(1e3 * statistics.median(disturbed), 1), "p99": round(1e3 * p99, 1)},
        "p99 / calm p50": round(p99 / p50, 2),
        "calm p99 / calm p50": round(statistics.quantiles(calm, n=100)[98] / p50, 2),
        "gaps": {"calm": len(calm), "disturbed": len(disturbed)},
        "prompt_first_token_ms": round(1e3 * statistics.median(first), 1),
        "rounds": rounds,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and its 95 % interval."""
    low, high = bootstrap_interval(values, statistics.median)
    return {"median": round(statistics.median(values), 3), "low": round(low, 3), "high": round(high, 3)}


if __name__ == "__main__":
    main()
