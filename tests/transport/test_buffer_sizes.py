"""Socket buffers: asked for before connect on both sides, what was granted is logged, and too little is a warning."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys

import pytest

from smolcluster.transport import tcp
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

TOKEN = b"correct horse battery staple"
WAIT = 20.0
ASKED = 128 << 10  # below every system's limit


def connected(stack: contextlib.ExitStack, dialling: TcpOptions, listening: TcpOptions) -> tuple[Channel, Channel]:
    listener = stack.enter_context(
        contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id="run", options=listening))
    )
    dialled = TcpNetwork(TOKEN, dialling).dial_channel(listener.address, Hello(1, "bulk:world", "run"), WAIT)
    stack.callback(dialled.abort, tcp.ConnectionLost("the test is over"))
    accepted = listener.accept_channel(1, "bulk:world", WAIT)
    stack.callback(accepted.abort, tcp.ConnectionLost("the test is over"))
    return dialled, accepted


def buffers(channel: Channel) -> tuple[int, int]:
    assert isinstance(channel, tcp.TcpChannel)
    return tcp._granted(channel._sock)


def test_both_sides_get_the_buffers_they_asked_for() -> None:
    with contextlib.ExitStack() as stack:
        dialled, accepted = connected(stack, TcpOptions(buffer_bytes=ASKED), TcpOptions(buffer_bytes=2 * ASKED))
        assert buffers(dialled) == (ASKED, ASKED)
        assert buffers(accepted) == (2 * ASKED, 2 * ASKED)
        assert dialled.socket_state().buffer_bytes == ASKED


def test_what_was_granted_is_logged_once_for_each_connection(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smolcluster")
    with contextlib.ExitStack() as stack:
        dialled, _ = connected(stack, TcpOptions(buffer_bytes=ASKED), TcpOptions())
        sent, received = buffers(dialled)
    lines = [line for line in caplog.messages if line.startswith("socket buffers peer=")]
    assert len(lines) == 2
    (dialler,) = (line for line in lines if "peer=tcp://127.0.0.1:" in line)
    assert dialler.endswith(f"lane=bulk:world asked={ASKED} sent={sent} recv={received}")
    (listener,) = (line for line in lines if "peer=rank 1 " in line)
    assert " asked=auto " in listener


def test_less_than_asked_is_one_warning_that_says_what_to_change(caplog: pytest.LogCaptureFixture) -> None:
    asked = tcp.MAX_BUFFER_BYTES
    with contextlib.ExitStack() as stack:
        dialled, _ = connected(stack, TcpOptions(buffer_bytes=asked), TcpOptions(buffer_bytes=asked))
        if min(buffers(dialled)) >= asked:
            pytest.skip("this system grants a GiB")
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert f"asked={asked}" in warning
    assert "cluster.buffer_size" in warning
    if sys.platform == "linux":
        assert f"sysctl -w net.core.wmem_max={asked} net.core.rmem_max={asked}" in warning


def test_buffers_that_are_granted_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        connected(stack, TcpOptions(buffer_bytes=ASKED), TcpOptions(buffer_bytes=ASKED))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_system_that_refuses_what_is_too_large_is_asked_for_less() -> None:
    class Refusing(socket.socket):
        """As macOS: above the limit nothing is changed."""

        granted: dict[int, int] = {}  # noqa: RUF012 - one socket

        def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
            if value > 1 << 20:
                raise OSError(errno.ENOBUFS, "No buffer space available")
            self.granted[option] = value

    with Refusing() as sock:
        tcp._set_buffers(sock, TcpOptions(buffer_bytes=6 << 20))
        assert sock.granted == {socket.SO_SNDBUF: 768 << 10, socket.SO_RCVBUF: 768 << 10}


def test_more_than_a_c_int_is_cut_to_what_can_be_asked() -> None:
    with socket.socket() as sock:
        tcp._set_buffers(sock, TcpOptions(buffer_bytes=1 << 40))
