"""What the nodes of a cluster file read of the model's files, and the most memory that they take.

    python benchmarks/serving_memory.py                   a random GPT-2 of 124 M parameters over three nodes, fp32
    python benchmarks/serving_memory.py --dtype bf16 int8 others
    python benchmarks/serving_memory.py --model FOLDER    another model

A controller without layers and three nodes, as a user starts them, each node under strace (needs it, and Linux). Four
streams fill their slots. Bytes: what a node's calls of the system gave it of the model's weight files, against those of
the tensors of its layers; headers count as well. Memory: the largest resident set (VmHWM) of a node less what it had
before it knew of a controller, against the weights, keys and values that it holds. What it then has of memory that is
its own, and not code of libraries from their files (RssAnon), is told besides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import save
from serving_latency import ask, running
from serving_speed import gpt2_124m

from smolcluster.device import prepare_process
from smolcluster.models.tensor_files import TensorFiles
from smolcluster.serving.layer_store import CacheSize, LayerStore

NODES, SLOTS, LENGTH = 3, 4, 256
CALLS = "read,pread64,readv,preadv,preadv2,mmap,copy_file_range,sendfile"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder. Default: a random GPT-2 of 124 M parameters")
    parser.add_argument("--dtype", nargs="+", default=["fp32"])
    parser.add_argument("--name", default="serving_memory", help="of the result")
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        raise SystemExit("needs strace")
    prepare_process()
    with contextlib.ExitStack() as stack:
        model = arguments.model or Path(gpt2_124m(stack.enter_context(tempfile.TemporaryDirectory())))
        found = {dtype: measure(model.resolve(), dtype) for dtype in arguments.dtype}
    for dtype, nodes in found.items():
        print(dtype, *(json.dumps(node) for node in nodes), sep="\n  ")
    save(arguments.name, {"slots": SLOTS, "length": LENGTH, "nodes": found})


def measure(model: Path, dtype: str) -> list[dict[str, Any]]:
    """All nodes with weights of one dtype."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        ports = free_ports(NODES + 2)
        names = [f"node{n}" for n in range(1, NODES + 1)]
        cluster = {
            "server": "head",
            "host_ip": dict.fromkeys(["head", *names], "127.0.0.1"),
            "port": dict(zip(["head", *names], ports, strict=False)),
            "serving": {"controller": "head", "max_concurrent": SLOTS, "ctx_length": LENGTH},
            "web_interface": {"api_port": ports[-1]},
        }
        file, token = folder / "cluster.yaml", folder / "token"
        file.write_text(json.dumps(cluster))
        smolcluster = [sys.executable, "-m", "smolcluster"]
        subprocess.run([*smolcluster, "token", "new", "--file", token], check=True, stdout=subprocess.DEVNULL)
        serve = [*smolcluster, "serve", "--cluster", file, "--model", model, "--dtype", dtype, "--token-file", token]
        processes, before = [], []
        for name in names:
            # A file for each thread: in one for all, calls at the same time are cut in two.
            trace = ["strace", "-ff", "-y", "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", folder / f"{name}.trace"]
            running_node = running([*map(str, trace), *map(str, serve), "--hostname", name], folder / f"{name}.log")
            stack.enter_context(running_node)
        for name in names:
            processes.append(node_process(name, file))
            stack.callback(processes[-1].terminate)  # strace, told to end, would leave it alone
            before.append(settled(processes[-1]))
        stack.enter_context(running([*map(str, serve)], folder / "head.log"))
        fill(model, ports[-1], folder / "head.log")
        stages = layers_of(ask(ports[-1], "GET", "/config")[1])
        memory = [status(process) for process in processes]
        stack.close()
        return [
            describe(model, dtype, stages[name], base, peak, folder / f"{name}.trace")
            for name, base, peak in zip(names, before, memory, strict=True)
        ]


def layers_of(config: dict[str, Any]) -> dict[str, range]:
    """Of each node: 0 is the entry, then the blocks, then the exit."""
    found, begin = {}, 0
    for number, (name, blocks) in enumerate(zip(config["nodes"], config["split"], strict=True)):
        end = begin + blocks + (number == 0) + (number == len(config["nodes"]) - 1)
        found[name], begin = range(begin, end), end
    return found


def describe(
    model: Path, dtype: str, layers: range, before: dict[str, int], after: dict[str, int], trace: Path
) -> dict[str, Any]:
    """One node's figures."""
    store = LayerStore(model, dtype)
    held = sum(cost.held for cost in store.costs(CacheSize(SLOTS, LENGTH))[layers.start : layers.stop])
    with TensorFiles(model) as files:
        own = sum(stored.nbytes for name, stored in files.tensors.items() if is_of(name, layers, store.layers))
    read = bytes_read(trace)
    peak = after["VmHWM"] - before["VmRSS"]
    return {
        "layers": [layers.start, layers.stop],
        "own_mb": round(own / 1e6, 1),
        "read_mb": round(read / 1e6, 1),
        "read / own": round(read / own, 4),
        "held_mb": round(held / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "peak / held": round(peak / held, 3),
        "anonymous / held": round((after["RssAnon"] - before["RssAnon"]) / held, 3),
    }


def is_of(name: str, layers: range, count: int) -> bool:
    """Whether a tensor of a GPT-2 or of a model like Llama belongs to one of these layers: 0 is the entry."""
    if number := re.search(r"\b(?:h|layers)\.(\d+)\.", name):
        return int(number[1]) + 1 in layers
    is_entry = any(part in name for part in ("wte", "wpe", "embed_tokens"))
    is_tied_head = any(part in name for part in ("wte", "embed_tokens"))
    if "lm_head" in name or "ln_f" in name or name.endswith("model.norm.weight"):
        return count - 1 in layers
    return (is_entry and 0 in layers) or (is_tied_head and count - 1 in layers)


def bytes_read(trace: Path) -> int:
    """Of files of weights: what calls returned, and what was mapped."""
    total = 0
    lines = [
        each for file in trace.parent.glob(f"{trace.name}.*") for each in file.read_text(errors="replace").split("\n")
    ]
    for line in lines:
        if ".safetensors>" not in line:
            continue
        if "mmap(" in line:
            length = re.search(r"mmap\([^,]+, (\d+)", line)
            total += int(length[1]) if length else 0
        elif returned := re.search(r"= (\d+)$", line):
            total += int(returned[1])
    return total


def fill(model: Path, port: int, log: Path) -> None:
    """As many streams as there are slots, each as long as one."""
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/health")[0] == 200:
                break
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing is served:\n{log.read_text()}")
        time.sleep(0.3)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]

    def write(prompt: Sequence[int]) -> None:
        body = {"model": model.name, "prompt": prompt, "max_tokens": LENGTH - 64, "temperature": 0}
        code, answer = ask(port, "POST", "/v1/completions", body)
        if code != 200:
            raise SystemExit(f"status {code}: {answer}")

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(write, torch.randint(3, vocab_size, (SLOTS, 60)).tolist()))


def node_process(name: str, cluster: Path) -> psutil.Process:
    """The node itself, below strace."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline", "name"]):
            command = process.info["cmdline"] or []
            if (
                str(cluster) in command
                and command[-2:] == ["--hostname", name]
                and "strace" not in Path(command[0]).name
            ):
                return process
        time.sleep(0.1)
    raise SystemExit(f"{name} did not start")


def settled(process: psutil.Process) -> dict[str, int]:
    """Its memory when everything is imported and it waits for its controller."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        now = status(process)
        if abs(now["VmRSS"] - last) > 1 << 20 or now["VmRSS"] < 100 << 20:
            last, since = now["VmRSS"], time.monotonic()
        time.sleep(0.2)
    return status(process)


def status(process: psutil.Process) -> dict[str, int]:
    """Bytes of /proc/PID/status."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}


def free_ports(count: int) -> list[int]:
    """Different ones."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in made]


if __name__ == "__main__":
    main()
