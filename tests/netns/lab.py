"""A few hosts of our own on one bridge: network namespaces with shaped links. Linux, root, iproute2.

The bridge has a namespace of its own, so nothing here reaches any other network. Host i (from 0) is 198.18.0.(i+1).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


def missing() -> str | None:
    """Why namespaces cannot be made here, None if they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(absent)} (Debian: iproute2)" if absent else None


@dataclass(frozen=True, slots=True)
class Lab:
    """Hosts in namespaces."""

    prefix: str
    hosts: int

    def address(self, host: int) -> str:
        """The host's IPv4 address."""
        return f"198.18.0.{host + 1}"

    def popen(self, host: int, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start `command` on a host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", f"{self.prefix}{host}", *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cut(self, host: int) -> None:
        """Take the host's link down: nothing is refused, nothing answers."""
        _run("ip", "-n", f"{self.prefix}{host}", "link", "set", "eth0", "down")


@contextlib.contextmanager
def network(hosts: int, *, rate: str | None = None) -> Iterator[Lab]:
    """Make the hosts; `rate` (such as "100mbit") shapes each one's way out."""
    prefix = f"smol{os.getpid()}x"
    switch = f"{prefix}sw"
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in range(hosts):
            name = f"{prefix}{host}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            peer = ("peer", "name", f"p{host}", "netns", switch)
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", *peer)
            _run("ip", "-n", name, "addr", "add", f"198.18.0.{host + 1}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            _run("ip", "-n", switch, "link", "set", f"p{host}", "master", "br0")
            _run("ip", "-n", switch, "link", "set", f"p{host}", "up")
            if rate is not None:
                shape = ("tbf", "rate", rate, "burst", "128kb", "latency", "50ms")
                _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        yield Lab(prefix, hosts)
    finally:
        for name in [*(f"{prefix}{host}" for host in range(hosts)), switch]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
