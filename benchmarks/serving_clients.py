"""Clients that nobody here wrote, load, clients that go, and bad input, against real `smolcluster serve` processes.

    python benchmarks/serving_clients.py                           everything, in one process and in three stages
    python benchmarks/serving_clients.py --only load --local 1     one part of it
    python benchmarks/serving_clients.py --cases 300 --out FILE    fewer of schemathesis' cases

Needs the packages openai, httpx-sse and schemathesis. promtool, of Prometheus, checks /metrics where it is installed.
"Within one token" is defined in tests/serving/gone_clients.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import machine
import psutil

sys.path.insert(1, str(Path(__file__).parent.parent / "tests"))

from models.hf_folders import trained_folder
from serving import foreign_clients as clients
from serving.bad_requests import send_what_is_wrong, slow_clients, status_of
from serving.foreign_clients import MODEL, STORY, Address
from serving.gone_clients import watch_disconnects

KEY = "a-key-for-the-benchmark"
COMMAND = [sys.executable, "-c", "from smolcluster.cli import main; main()", "serve", "--port", "0", "--dtype", "fp32"]
LIMITS = ["--max-concurrent", "8", "--max-queue", "16"]
DEADLINE = 120.0  # seconds after which a request hangs
DISCONNECTS = 300
# What is wanted: the second hundred may leave that much more memory than the first.
RSS_GROWTH = 0.02


PYTHON_DEFECT = "SystemError: AST constructor recursion depth mismatch"


def main() -> int:
    """Run the parts, print and save what came of them; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", default="1,3", help="numbers of processes, one run each")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by name, with commas")
    parser.add_argument("--cases", type=int, default=2000, help="of schemathesis, at least")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where the figures go; default: benchmarks/results")
    arguments = parser.parse_args()
    folder, defects = trained_folder(MODEL), list[str]()
    figures: dict[str, Any] = {"model": MODEL, "dtype": "fp32", "limits": " ".join(LIMITS), "runs": {}}
    for processes in map(int, arguments.local.split(",")):
        run = figures["runs"][f"--local {processes}"] = dict[str, Any]()
        for name in arguments.only.split(","):
            began = time.perf_counter()
            try:
                run[name] = PARTS[name](folder, processes, arguments)
            except Exception as error:  # noqa: BLE001 - this is what is looked for
                run[name] = {"defect": f"{type(error).__name__}: {error}"[:2000]}
                defects.append(f"--local {processes}: {name}")
            seconds = round(time.perf_counter() - began, 1)
            print(f"--local {processes} {name} {seconds} s {json.dumps(run[name])}", file=sys.stderr, flush=True)
    figures["defects"] = defects
    if arguments.out is None:
        machine.save("serving_clients", figures)
    else:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if defects else 0


class Served:
    """A server's process, and where it is."""

    def __init__(self, process: subprocess.Popen[str], address: Address) -> None:
        self.address = address
        self._root = psutil.Process(process.pid)
        self.said: list[str] = []  # on stderr, after where it is served
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: Any) -> None:
        self.said += list(stream)

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def rss(self) -> int:
        """Resident bytes of the server and its stages."""
        return sum(process.memory_info().rss for process in self._all())

    def open_things(self) -> tuple[int, int]:
        """Threads and file descriptors of the process that answers."""
        return self._root.num_threads(), self._root.num_fds()


@contextmanager
def serving(folder: Path, processes: int, *, key: str | None = None) -> Iterator[Served]:
    """`smolcluster serve`, until it is told to end; it has to end without an error."""
    more = ["--model", str(folder), *LIMITS, *(["--local", str(processes)] if processes > 1 else [])]
    with contextlib.ExitStack() as stack:
        if key is not None:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "key")
            file.write_text(key)
            more += ["--api-key-file", str(file)]
        process = subprocess.Popen([*COMMAND, *more], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"is served at http://127\.0\.0\.1:(\d+);", line)
            assert found, line + process.stderr.read()
            served = Served(process, Address(int(found[1]), key))
            yield served
            process.terminate()
            assert process.wait(30) == 0
            tracebacks = [line for line in served.said if "Traceback" in line]
            assert not tracebacks, "".join(served.said)[-3000:]
        finally:
            process.kill()
            process.wait()


# ---- the parts


def use_clients(folder: Path, processes: int, _: argparse.Namespace) -> dict[str, Any]:
    """The openai package, a parser of server-sent events, a WebSocket client; and a key."""
    with serving(folder, processes, key=KEY) as served:
        found = {
            "openai": clients.use_openai(served.address),
            "event_source": clients.use_event_source(served.address),
            "websocket": clients.use_websocket(served.address),
        }
        clients.wait_until_free(served.address)
    return found


def send_bad_input(folder: Path, processes: int, _: argparse.Namespace) -> dict[str, Any]:
    """Requests and folders that are wrong."""
    with serving(folder, processes, key=KEY) as served:
        found: dict[str, Any] = {"requests": send_what_is_wrong(served.address)}
        with slow_clients(served.address, 500):
            began = time.perf_counter()
            assert status_of(served.address) == 200
            found["slow_clients"] = {"open": 500, "health_ms": round(1000 * (time.perf_counter() - began), 1)}
        status = httpx.get(f"{served.address.url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code
        assert status == 401
        assert clients.use_websocket(served.address)["answered"] == 7
    if processes == 1:
        found["folders"] = refuse_folders(folder)
    return found


def refuse_folders(folder: Path) -> dict[str, str]:
    """Folders that cannot be served: exit code 2 and what to do, without a traceback."""
    from safetensors.torch import load_file, save_file

    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, "copy")
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        names = sorted(tensors)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, held in halves.items():
            save_file({each: tensors[each].clone() for each in held}, copy / shard, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {each: shard for shard, held in halves.items() for each in held}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        (copy / "model-00002-of-00002.safetensors").unlink()
        empty = Path(name, "empty")
        empty.mkdir()
        for what, given in (("unknown", Path(name, "nowhere")), ("missing shard", copy), ("empty", empty)):
            done = subprocess.run(
                [*COMMAND, "--model", str(given)], capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 2, (what, done)
            assert done.stderr.startswith("error: "), done.stderr
            assert "Traceback" not in done.stderr
            said[what] = done.stderr.strip().replace(name, "FOLDER")
    return said


def put_load(folder: Path, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Twice a hundred requests at once; then what Prometheus' own tool says of /metrics."""
    with serving(folder, processes) as served:
        hundreds, resident = [], []
        for number in (1, 2):
            began = time.perf_counter()
            statuses = asyncio.run(_hundred(served.address, arguments.seed + number))
            seconds = time.perf_counter() - began
            clients.wait_until_free(served.address)
            time.sleep(1)
            resident.append(served.rss())
            assert statuses.total() == 100, statuses
            assert set(statuses) == {"200", "429"}, statuses
            assert statuses["200"] >= 24, statuses
            hundreds.append({**statuses, "seconds": round(seconds, 2)})
        growth = resident[1] / resident[0] - 1
        assert growth <= RSS_GROWTH, resident
        text, values = clients.read_metrics(served.address)
        assert values["num_requests_running"] == values["num_requests_waiting"] == 0
        return {
            "hundreds": hundreds,
            "rss_bytes": resident,
            "rss_growth": round(growth, 5),
            "promtool": check_metrics(text),
        }


async def _hundred(server: Address, seed: int) -> Counter[str]:
    dice = random.Random(seed)
    asked = [_mixed(dice, number) for number in range(100)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE, limits=limits) as client:

        async def one(path: str, body: dict[str, Any]) -> str:
            async with client.stream("POST", path, json=body) as response:
                content = (await response.aread()).decode()
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert json.loads(content)["error"]["code"] == "queue_full"
            elif path == "/chat":
                assert json.loads(content.strip().split("\n\n")[-1][6:])["num_tokens"] == body["max_tokens"]
            elif body["stream"]:
                assert content.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(content)["usage"]["completion_tokens"] == body["max_tokens"]
            return str(response.status_code)

        return Counter(await asyncio.gather(*(asyncio.wait_for(one(*each), DEADLINE) for each in asked)))


def _mixed(dice: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    text = " ".join([STORY] * dice.randint(1, 40))
    more = {"max_tokens": dice.choice([1, 5, 20, 60, 150]), "stream": bool(number % 2), "seed": number}
    if number % 3 == 0:
        return "/chat", {"text": text, **more}
    if number % 3 == 1:
        return "/v1/completions", {"model": MODEL, "prompt": text, **more}
    return "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def check_metrics(text: str) -> str:
    """What promtool says: "accepted", or "not run"; raises if it does not accept it.

    Its advice on style, exit code 3, has a line for each name: ':' is meant for recording rules. vLLM's names have it.
    """
    tool = shutil.which("promtool")
    if tool is None:
        return "not run"
    done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    advice = done.stderr.splitlines()
    others = [line for line in advice if not line.endswith("metric names should not contain ':'")]
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert not others, others
    return "accepted" + (f"; advises against ':' in {len(advice)} names" if advice else "")


def disconnect(folder: Path, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Clients that go at random moments, 20 at a time; then alone, to count the tokens made for nobody."""
    with serving(folder, processes) as served:
        asyncio.run(_go_away(served.address, 60, arguments.seed - 1))  # what the first ones take once is no leak
        clients.wait_until_free(served.address)
        resident, opened, free_ms = [served.rss()], served.open_things(), []
        seen: Counter[str] = Counter()
        for hundred in range(DISCONNECTS // 100):
            seen += asyncio.run(_go_away(served.address, 100, arguments.seed + hundred))
            free_ms.append(round(1000 * clients.wait_until_free(served.address), 1))
            resident.append(served.rss())
        time.sleep(1)
        left = served.open_things()
        assert left[0] <= opened[0] + 8, (opened, left)  # asyncio's threads come as they are needed, and stay
        assert left[1] <= opened[1] + 2, (opened, left)
        found = {
            "seen_before_they_went": dict(seen),
            "free_ms_after_each_hundred": free_ms,
            "rss_bytes_before_and_after_each_hundred": resident,
            "threads_and_files_before": opened,
            "threads_and_files_after": left,
            "alone": _alone(served.address, 40),
        }
        noise = Counter(line.strip() for line in served.said)
        if noise:
            found["said"] = dict(noise.most_common(5))
    found["inside"] = _inside(folder, processes)
    return found


async def _go_away(server: Address, count: int, seed: int) -> Counter[str]:
    dice, seen, room = random.Random(seed), Counter[str](), asyncio.Semaphore(20)

    async def one(number: int) -> None:
        patience, least = dice.choice([0.0, 0.01, 0.1, 0.3]) * dice.random(), dice.choice([0, 0, 1, 400])
        kind = ("stream", "whole", "websocket")[number % 3]
        async with room:
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(_request(kind))
            received = b""
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.sleep(patience), DEADLINE)
                while len(received) < least and kind != "whole":
                    piece = await asyncio.wait_for(reader.read(4096), 0.5)
                    if not piece:
                        break
                    received += piece
            refused = received.startswith(b"HTTP/1.1 429")
            seen[f"{kind}, {'refused' if refused else 'in the middle' if received else 'before a byte was read'}"] += 1
            if dice.random() < 0.5:
                writer.transport.abort()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    await asyncio.gather(*(one(number) for number in range(count)))
    return seen


def _request(kind: str) -> bytes:
    if kind == "websocket":
        head = (
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        body = b'{"text":"Once upon a time","max_tokens":480}'
        return head + bytes([0x81, 0x80 | len(body), 0, 0, 0, 0]) + body  # one masked frame, the mask zero
    asked = {"model": MODEL, "prompt": STORY, "max_tokens": 480, "stream": kind == "stream"}
    raw = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw


def _alone(server: Address, count: int) -> dict[str, Any]:
    """One stream at a time, closed after some tokens: seen from outside, with the way there and the noticing."""
    made_after, free_ms = [], []
    _, first = clients.read_metrics(server)
    for number in range(count):
        _, before = clients.read_metrics(server)
        asked = {"model": MODEL, "prompt": STORY, "max_tokens": 480, "stream": True, "seed": number, "logprobs": 0}
        received, wanted = 0, 1 + number % 30
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=DEADLINE) as response:
            for line in response.iter_lines():  # with logprobs every token has an event
                received += line.startswith("data: ")
                if received >= wanted:
                    break
        free_ms.append(1000 * clients.wait_until_free(server))
        _, after = clients.read_metrics(server)
        made_after.append(after["generation_tokens_total"] - before["generation_tokens_total"] - received)
    _, last = clients.read_metrics(server)
    gaps = last["inter_token_latency_seconds_count"] - first["inter_token_latency_seconds_count"]
    seconds = last["inter_token_latency_seconds_sum"] - first["inter_token_latency_seconds_sum"]
    return {
        "clients": count,
        "tokens_beyond_the_last_one_read": _spread(made_after),
        "ms_until_health_says_free": _spread(free_ms),
        "ms_of_a_token": round(1000 * seconds / gaps, 3),
    }


def _inside(folder: Path, processes: int) -> dict[str, Any]:
    """The same in this process, from the moment at which the server has noticed it."""
    from smolcluster.config.schema import ServingConfig
    from smolcluster.run.serve import listen_http, make_server, make_service
    from smolcluster.run.stages import Layout
    from smolcluster.serving.metrics import ServingMetrics

    metrics, listener = ServingMetrics(MODEL), listen_http("127.0.0.1", 0)
    service = make_service(
        str(folder), ServingConfig(max_concurrent=8), layout=Layout(processes=processes), observer=metrics
    )
    server = make_server(service, "127.0.0.1", key=None, metrics=metrics)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = Address(listener.getsockname()[1])
        found: dict[str, Any] = {}
        for is_streamed in (False, True):
            seen = watch_disconnects(service, address, 60, is_streamed=is_streamed)
            assert max(seen["begun_after"]) <= 1, seen
            found["stream" if is_streamed else "whole"] = {
                "clients": 60,
                "steps_begun_after_it_was_noticed": _spread(seen["begun_after"]),
                "ms_from_noticed_to_free": _spread(seen["free_ms"]),
                "ms_of_a_token": _spread(seen["token_ms"]),
            }
        return found
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "most": round(max(values), 3)}


def let_schemathesis_try(folder: Path, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cases made from /openapi.json: valid ones and wrong ones."""
    with serving(folder, processes) as served, tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.json")
        total: Counter[str] = Counter()
        found: dict[str, Any] = {"checks": "all but positive_data_acceptance", "seeds": []}
        seed = arguments.seed
        while total["generated"] < arguments.cases:
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address.url}/openapi.json"]
            command += ["--phases", "coverage,fuzzing", "--seed", str(seed), "--no-shrink", "-w", "4"]
            command += ["--max-examples", str(max(20, arguments.cases // 5))]  # of each operation that has so many
            # What is of the right form may still name a model that is not here, or be too long.
            command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
            command += ["--request-timeout", "60", "--report", "json", "--report-json-path", str(report)]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=1500,
                check=False,
                cwd=name,
            )
            assert report.is_file(), done.stdout + done.stderr
            told = json.loads(report.read_text())
            assert not told["failures"], done.stdout[-6000:]
            if done.returncode != 0:  # a defect of CPython 3.11 (its issue 106905) that threads run into
                errors = re.search(r"Runtime Error: (\d+)\n\n", done.stdout)
                assert errors, done.stdout[-6000:]
                assert int(errors[1]) == done.stdout.count(PYTHON_DEFECT), done.stdout[-6000:]
                found["own_errors"] = found.get("own_errors", 0) + int(errors[1])
            total += Counter({key: value for key, value in told["test_cases"].items() if isinstance(value, int)})
            found["seeds"].append(seed)
            found["version"], found["operations"] = told["schemathesis_version"], told["operations"]["tested"]
            found["accepted"] = sum(
                part["accepted"] for rates in told["valid_rates"].values() for part in rates.values()
            )
            seed += 1
        clients.wait_until_free(served.address)
        return {**found, "cases": total["generated"], "failures": total["with_failures"]}


PARTS: dict[str, Callable[[Path, int, argparse.Namespace], dict[str, Any]]] = {
    "clients": use_clients,
    "bad_input": send_bad_input,
    "load": put_load,
    "disconnects": disconnect,
    "schemathesis": let_schemathesis_try,
}


if __name__ == "__main__":
    sys.exit(main())
