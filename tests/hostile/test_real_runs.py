"""Real runs, looked at from outside: no rank unpickles anything, and the token is nowhere that it should not be.

Each rank imports torch (3 seconds of processor time), so there are two runs, shared by all tests: one of `--local 2`
and one of two machines of a cluster file, both in a network namespace whose every packet is kept.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from netns import lab
from smolcluster.transport.security import TOKEN_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "src"
TRAIN = [
    "--preset", "classicdp_digits", "--max-steps", "4", "--override", "training.precision=fp32",
    "--override", "training.eval_steps=2",
]  # fmt: skip


@dataclass
class Seen:
    """What is known of a run after its end."""

    folder: Path
    outputs: list[str]
    processes: dict[int, list[dict[str, Any]]]  # what each Python process has written of itself
    packets: bytes | None  # None: they could not be kept
    tokens: list[str] = field(default_factory=list)  # that this run has known

    def events(self, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for process, events in self.processes.items():
            for event in events:
                if event["kind"] == kind:
                    yield process, event

    def ranks(self) -> list[int]:
        """The processes that computed."""
        found = []
        for process, event in self.events("start"):
            words = event["arguments"]
            if "smolcluster.run.rank" in words or "node" in words:
                found.append(process)
        return found


def spellings(token: str) -> list[bytes]:
    """How a token may look: as text, as the bytes that its hexadecimal digits are, and both in base64."""
    raws = [token.encode(), bytes.fromhex(token)]
    return [
        *raws, token.upper().encode(), *(base64.b64encode(raw).rstrip(b"=") for raw in raws),
        *(base64.urlsafe_b64encode(raw).rstrip(b"=") for raw in raws),
    ]  # fmt: skip


class Place:
    """Where a run takes place: a network namespace with nothing but a loopback, if this user may make one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prefix: list[str] = []
        self._sniffer: subprocess.Popen[str] | None = None
        site = folder / "site"
        site.mkdir()
        shutil.copy(HERE / "sitecustomize_audit.py", site / "sitecustomize.py")
        (folder / "audit").mkdir()
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", TOKEN_VARIABLE)},
            "PYTHONPATH": os.pathsep.join([str(site), str(SOURCE)]),
            "HOSTILE_AUDIT": str(folder / "audit"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        self._name = f"smol{os.getpid()}{folder.name[-6:]}"

    def open(self) -> None:
        if lab.missing() is not None:
            return
        lab._run("ip", "netns", "add", self._name)
        lab._run("ip", "-n", self._name, "link", "set", "lo", "up")
        self._prefix = ["ip", "netns", "exec", self._name]
        self._sniffer = subprocess.Popen(
            [*self._prefix, sys.executable, "-S", str(HERE / "sniff.py"), str(self.folder / "packets")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._sniffer.stdout is not None
        assert self._sniffer.stdout.readline() == "ready\n"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "smolcluster", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**self._environment, **environment},
        )  # fmt: skip

    def look(self, outputs: list[str]) -> Seen:
        packets = None
        if self._sniffer is not None:
            self._sniffer.communicate(timeout=10)
            packets = (self.folder / "packets").read_bytes()
        processes = {
            int(path.stem): [json.loads(line) for line in path.read_text().splitlines()]
            for path in (self.folder / "audit").iterdir()
        }
        return Seen(self.folder / "run", outputs, processes, packets)

    def close(self) -> None:
        if self._sniffer is not None:
            self._sniffer.kill()
            self._sniffer.communicate()
        if self._prefix:
            subprocess.run(["ip", "netns", "del", self._name], check=False, capture_output=True)


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Place]:
    made = Place(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """`--local 2`, of a user whose shell knows a token, which such a run does not need."""
    users = secrets.token_hex(32)
    with place(tmp_path_factory.mktemp("local")) as here:
        run = here.start("train", *TRAIN, "--local", "2", "--out", str(here.folder / "run"), **{TOKEN_VARIABLE: users})
        out = run.communicate(timeout=100)[0]
        assert run.returncode == 0, out
        seen = here.look([out])
    launcher = next(process for process, event in seen.events("start") if "train" in event["arguments"])
    seen.tokens = [users, *(event["value"] for process, event in seen.events("drawn") if process == launcher)]
    return seen


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two machines: one has the token in its environment, the other in a file."""
    token = secrets.token_hex(32)
    with place(tmp_path_factory.mktemp("nodes")) as here:
        file = here.folder / "token"
        file.touch(0o600)
        file.write_text(token + "\n")
        ports = free_ports(2)
        hosts = [{"hostname": f"mini{n}", "rank": n, "port": port, "ip": "127.0.0.1"} for n, port in enumerate(ports)]
        cluster = here.folder / "cluster.yaml"
        cluster.write_text(
            json.dumps({"num_workers": 2, "seed": 1, "allToAllTopology": {"workers": {"regular": hosts}}})
        )
        common = ["node", "--cluster", str(cluster), *TRAIN, "--out", str(here.folder / "run")]
        started = [
            here.start(*common, "--hostname", "mini0", **{TOKEN_VARIABLE: token}),
            here.start(*common, "--hostname", "mini1", "--token-file", str(file)),
        ]
        outputs = [node.communicate(timeout=100)[0] for node in started]
        assert [node.returncode for node in started] == [0, 0], outputs
        file.unlink()
        seen = here.look(outputs)
    seen.tokens = [token]
    return seen


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


@pytest.fixture(params=["local", "nodes"])
def seen(request: pytest.FixtureRequest) -> Seen:
    """Each of the two runs."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Seen)
    return found


def test_no_rank_unpickles_anything_from_its_first_line_to_its_last(seen: Seen) -> None:
    # Start-up included: importing torch and reading the data unpickle nothing either.
    ranks = seen.ranks()
    assert len(ranks) == 2
    found = [(process, event) for process, event in seen.events("pickle") if process in ranks]
    heard = sorted((process, event["what"]) for process, event in found)
    # One each, of the hook's own test that it hears anything.
    assert heard == sorted((rank, "collections.OrderedDict") for rank in ranks), "\n".join(
        f"{event['what']}\n{event['where']}" for _, event in found
    )


def test_the_token_stands_in_no_argument_list(seen: Seen) -> None:
    listed = [event["arguments"] for kind in ("start", "child") for _, event in seen.events(kind)]
    assert len(listed) >= 2
    text = json.dumps(listed).encode()
    assert not [token for token in seen.tokens if any(spelling in text for spelling in spellings(token))]


def test_no_process_of_a_local_run_has_a_token_in_its_environment(local: Seen) -> None:
    ranks = local.ranks()
    environments = [event["environment"] for process, event in local.events("start") if process in ranks]
    environments += [event["environment"] for _, event in local.events("child")]
    assert len(environments) >= 4
    text = json.dumps(environments).encode()
    assert not [token for token in local.tokens if any(spelling in text for spelling in spellings(token))]


def test_only_the_process_that_was_given_the_token_has_it_in_its_environment(nodes: Seen) -> None:
    holders = [event for _, event in nodes.events("start") if TOKEN_VARIABLE in event["environment"]]
    assert [event["arguments"][-1] for event in holders] == ["mini0"]
    children = json.dumps([event["environment"] for _, event in nodes.events("child")])
    assert nodes.tokens[0] not in children


def test_the_token_stands_in_no_output_log_or_file(seen: Seen) -> None:
    texts = {str(path): path.read_bytes() for path in seen.folder.rglob("*") if path.is_file()}
    assert any("rank0.log" in name for name in texts)
    texts |= {f"output {number}": output.encode() for number, output in enumerate(seen.outputs)}
    held = [
        (name, token)
        for name, text in texts.items()
        for token in seen.tokens
        if any(spelling in text for spelling in spellings(token))
    ]
    assert not held


@pytest.mark.netns
@pytest.mark.skipif(lab.missing() is not None, reason=lab.missing() or "")
def test_the_token_crosses_the_wire_in_no_packet(seen: Seen) -> None:
    assert seen.packets is not None
    assert seen.packets.count(b"bulk:world") >= 1  # it is what we think it is
    assert seen.packets.count(b'"kind":"join"') >= 1
    assert not [token for token in seen.tokens if any(spelling in seen.packets for spelling in spellings(token))]


def test_listening_is_on_loopback_by_default(local: Seen) -> None:
    log = (local.folder / "logs" / "rank1.log").read_text()
    assert "0.0.0.0" not in log
    assert "tcp://127.0.0.1:" in log
