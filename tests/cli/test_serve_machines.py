"""serve --cluster as users of several machines run it: one process for each, real signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.test_serve import MODEL, command
from models.hf_folders import trained_folder

PATIENCE = 1.5
PROMPT, TOKENS = "Once upon a time", 60
# Of a single process, which tests/serving compares with transformers.
ASKED = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "seed": 1, "temperature": 1}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


class Machines:
    """A cluster file, and processes that are its machines."""

    def __init__(self, folder: Path, names: list[str], more: str) -> None:
        self.folder = folder
        self.token, self.file = folder / "token", folder / "cluster.yaml"
        self.token.write_text("5" * 64)
        self.token.chmod(0o600)
        *ports, api = free_ports(len(names) + 1)
        hosts = "".join(f"  {name}: 127.0.0.1\n" for name in names)
        port = "".join(f"  {name}: {port}\n" for name, port in zip(names, ports, strict=True))
        self.file.write_text(
            f"host_ip:\n{hosts}port:\n{port}server: {names[0]}\npatience: {PATIENCE}\n"
            f"web_interface: {{api_port: {api}}}\n{more}"
        )
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.names = names
        self.address = ""

    def command(self, *arguments: object) -> list[str]:
        model = trained_folder(MODEL)
        return command(
            "serve", "--cluster", self.file, "--model", model, "--token-file", self.token, *arguments
        )  # fmt: skip

    def start(self, name: str, *arguments: object) -> subprocess.Popen[str]:
        whole = self.command(*arguments, *([] if name == self.names[0] else ["--hostname", name]))
        self.processes[name] = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True)
        return self.processes[name]

    def start_all(self, *arguments: object) -> None:
        for name in reversed(self.names):
            self.start(name, *arguments)
        self.wait_served()

    def wait_served(self) -> None:
        controller = self.processes[self.names[0]]
        assert controller.stderr is not None
        said = ""
        for line in controller.stderr:
            said += line
            if (found := re.search(r"is served at (http://\S+);", line)) is not None:
                self.address = found[1]
                return
        raise AssertionError(said)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> Any:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ask(self) -> str:
        text: str = self.post("/v1/completions", ASKED)["choices"][0]["text"]
        return text

    def until(self, path: str, key: str, value: object) -> None:
        deadline = time.monotonic() + 30
        while (found := self.get(path)[key]) != value:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def end_all() -> Iterator[list[Machines]]:
    made: list[Machines] = []
    yield made
    for machines in made:
        machines.end()


@pytest.fixture(scope="module")
def answer() -> str:
    options = ("--max-tokens", TOKENS, "--seed", 1, "--temperature", 1, "--dtype", "fp64")
    done = subprocess.run(
        command("generate", "--model", trained_folder(MODEL), "--prompt", PROMPT, *options,
                "--override", "serving.active_decoding_strategy=sampling"),
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    return done.stdout.removeprefix(PROMPT).removesuffix("\n")


def test_three_machines_lose_one_and_get_it_back(tmp_path: Path, end_all: list[Machines], answer: str) -> None:
    machines = Machines(tmp_path, ["alpha", "beta", "gamma"], "layer_distribution: {alpha: 1, beta: 3, gamma: 1}\n")
    end_all.append(machines)
    machines.start_all("--dtype", "fp64")
    config = machines.get("/config")
    assert (config["nodes"], config["split"]) == (["alpha", "beta", "gamma"], [1, 3, 1])
    assert machines.ask() == answer
    machines.processes["beta"].kill()
    assert machines.ask() == answer
    assert machines.get("/config")["nodes"] == ["alpha", "gamma"]
    machines.processes["beta"].communicate()
    machines.start("beta")
    deadline = time.monotonic() + 60
    while "beta" not in machines.get("/config")["nodes"]:
        assert time.monotonic() < deadline
        machines.post("/reconnect", {})
        assert machines.ask() == answer
    controller = machines.processes["alpha"]
    controller.send_signal(signal.SIGTERM)
    controller.communicate(timeout=30)
    assert controller.returncode == 0
    for name in ("beta", "gamma"):
        machines.processes[name].send_signal(signal.SIGTERM)
        _, said = machines.processes[name].communicate(timeout=30)
        assert machines.processes[name].returncode == 130
        assert "computes layers for alpha" in said
        assert "Traceback" not in said


def test_nodes_wait_for_a_controller_that_has_ended(tmp_path: Path, end_all: list[Machines], answer: str) -> None:
    machines = Machines(tmp_path, ["alpha", "beta"], "")
    end_all.append(machines)
    machines.start_all("--dtype", "fp64")
    assert machines.ask() == answer
    controller = machines.processes["alpha"]
    controller.send_signal(signal.SIGTERM)
    controller.communicate(timeout=30)
    assert controller.returncode == 0
    machines.start("alpha", "--dtype", "fp64")
    machines.wait_served()
    assert machines.get("/config")["nodes"] == ["alpha", "beta"]
    assert machines.ask() == answer


def test_a_controller_without_layers_has_a_spare(tmp_path: Path, end_all: list[Machines], answer: str) -> None:
    machines = Machines(tmp_path, ["pi", "left", "right", "spare"], "serving: {controller: pi, num_nodes: 2}\n")
    end_all.append(machines)
    machines.start_all("--dtype", "fp64")
    config = machines.get("/config")
    split = config["split"]
    assert (config["nodes"], sum(split), len(split)) == (["left", "right"], 5, 2)
    assert machines.ask() == answer
    machines.processes["left"].send_signal(signal.SIGSTOP)
    assert machines.ask() == answer
    config = machines.get("/config")
    assert (config["nodes"], sum(config["split"])) == (["spare", "right"], 5)


def test_replicas_on_machines_lose_no_answer(tmp_path: Path, end_all: list[Machines], answer: str) -> None:
    machines = Machines(tmp_path, ["alpha", "beta"], "")
    end_all.append(machines)
    machines.start_all("--mode", "dp", "--dtype", "fp64")
    config = machines.get("/config")
    assert (config["mode"], config["nodes"], config["split"]) == ("dp", [["alpha"], ["beta"]], [[5], [5]])
    one = [sys.executable, "-c", _ASK, machines.address, json.dumps(ASKED)]
    asked = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    machines.processes["beta"].kill()
    for each in asked:
        said, _ = each.communicate(timeout=60)
        assert json.loads(said)["choices"][0]["text"] == answer
    assert machines.ask() == answer
    assert machines.get("/health")["status"] == "ok"


_ASK = """
import sys, urllib.request
address, body = sys.argv[1:]
request = urllib.request.Request(address + "/v1/completions", body.encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.mark.parametrize(
    ("more", "arguments", "says"),
    [
        ("", ("--hostname", "nobody"), "alpha, beta"),
        ("", ("--local", 2), "--local"),
        ("", ("--mode", "pp"), "--mode pp"),
        ("serving: {num_nodes: 5}\n", (), "serving.num_nodes is 5"),
        ("layer_distribution: {alpha: 5}\n", (), "beta"),
        ("serving: {controller: gamma}\n", (), "gamma"),
    ],
)
def test_mistakes_end_with_2(tmp_path: Path, more: str, arguments: tuple[object, ...], says: str) -> None:
    machines = Machines(tmp_path, ["alpha", "beta"], more)
    done = subprocess.run(machines.command(*arguments), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_a_node_with_another_model_is_refused(tmp_path: Path, end_all: list[Machines]) -> None:
    machines = Machines(tmp_path, ["alpha", "beta"], "")
    end_all.append(machines)
    other = tmp_path / "other"
    other.mkdir()
    for file in trained_folder(MODEL).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text().replace("\n", " \n", 1))
    machines.start("alpha")
    whole = [
        str(other) if each == str(trained_folder(MODEL)) else each for each in machines.command("--hostname", "beta")
    ]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "config.json" in done.stderr
