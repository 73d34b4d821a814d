"""The token, and the handshake's messages as pure functions; test_handshake.py runs them over sockets."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcluster.errors import AuthFailed, ConfigError, FrameError
from smolcluster.transport import security
from smolcluster.transport.base import Hello
from smolcluster.transport.security import Refused, Transcript, load_token, save_token

TOKEN = b"correct horse battery staple"
HELLO = Hello(rank=3, lane="bulk:world", run_id="run-7", to=1)
NONCE, OTHER_NONCE = bytes(range(32)), bytes(range(32, 64))
TRANSCRIPT = Transcript(HELLO, NONCE, OTHER_NONCE)

posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


@pytest.fixture(autouse=True)
def no_token_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor the config folder of whoever runs the tests gives a token."""
    monkeypatch.delenv("SMOLCLUSTER_TOKEN", raising=False)
    monkeypatch.setattr(security, "token_path", lambda: tmp_path / "config" / "token")


# --- the token


def test_a_saved_token_is_loaded_again_from_the_config_folder() -> None:
    token = security.new_token()
    path = save_token(token)

    assert load_token() == token.hex().encode()
    assert path.read_text().strip() == token.hex()


@posix_only
def test_a_token_file_is_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("an older file with a wider mode\n")
    path.chmod(0o644)

    save_token(security.new_token(), path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_token_file_that_others_may_open_is_refused_with_the_repair(tmp_path: Path, mode: int) -> None:
    path = save_token(security.new_token(), tmp_path / "token")
    path.chmod(mode)

    with pytest.raises(ConfigError, match=r"other users can read .*chmod 600 .*token"):
        load_token(path)


def test_the_environment_gives_the_token_before_the_config_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    save_token(security.new_token())
    monkeypatch.setenv("SMOLCLUSTER_TOKEN", "  from the environment\n")

    assert load_token() == b"from the environment"


def test_a_named_file_gives_the_token_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = security.new_token()
    monkeypatch.setenv("SMOLCLUSTER_TOKEN", "from the environment")

    assert load_token(save_token(token, tmp_path / "token")) == token.hex().encode()


@pytest.mark.parametrize("text", ["x" * 15, "  " + "x" * 15 + "  \n", "   "])
def test_a_short_token_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SMOLCLUSTER_TOKEN", text)

    with pytest.raises(ConfigError, match=r"SMOLCLUSTER_TOKEN has \d+ characters, at least 16") as caught:
        load_token()
    assert "xxx" not in str(caught.value)


def test_a_missing_token_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cluster token: .*smolcluster token new"):
        load_token(tmp_path / "nowhere")


def test_a_token_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = save_token(security.new_token(), tmp_path / "token")
    path.write_bytes(b"\xff\xfe\x00" * 20)

    with pytest.raises(ConfigError, match="not text"):
        load_token(path)


def test_new_tokens_and_nonces_differ() -> None:
    assert len({security.new_token() for _ in range(100)}) == 100
    assert len({security.new_nonce() for _ in range(100)}) == 100
    assert len(security.new_token()) == len(security.new_nonce()) == 32


# --- the messages


@given(
    rank=st.integers(-(2**31), 2**31 - 1),
    lane=st.text(max_size=64).filter(lambda text: len(text.encode()) <= 64),
    run_id=st.text(max_size=64).filter(lambda text: len(text.encode()) <= 64),
    to=st.integers(0, security.MAX_RANK),
    nonce=st.binary(min_size=32, max_size=32),
)
def test_a_hello_survives_the_wire(rank: int, lane: str, run_id: str, to: int, nonce: bytes) -> None:
    packed = security.pack_hello(Hello(rank, lane, run_id, to), nonce)
    fixed, tail = packed[: security.HELLO_BYTES], packed[security.HELLO_BYTES :]

    assert security.hello_tail_bytes(fixed) == len(tail)
    assert security.unpack_hello(fixed, tail) == (Hello(rank, lane, run_id, to), nonce)


def test_the_layout_is_the_documented_one() -> None:
    assert (security.HELLO_BYTES, security.REPLY_BYTES) == (48, 40)
    packed = security.pack_hello(HELLO, NONCE)
    assert packed[:8] == b"SMOL\x00\x03\x01\x0a"
    assert packed[8:16] == b"\x05\x00\x00\x01\x00\x00\x00\x03"
    assert packed[16:48] == NONCE
    assert packed[48:] == b"bulk:worldrun-7"
    assert security.pack_challenge(NONCE) == b"SMOL\x00\x03\x02\x00" + NONCE
    assert security.pack_refused(2) == b"SMOL\x00\x03\x05\x02" + bytes(32)


@pytest.mark.parametrize("to", [-1, security.MAX_RANK + 1])
def test_a_rank_that_the_field_cannot_hold_is_not_packed(to: int) -> None:
    with pytest.raises(ValueError, match=f"rank {to} cannot be dialled"):
        security.pack_hello(replace(HELLO, to=to), NONCE)


@pytest.mark.parametrize("hello", [replace(HELLO, lane="é" * 33), replace(HELLO, run_id="x" * 65)])
def test_names_that_are_too_long_are_not_packed(hello: Hello) -> None:
    with pytest.raises(ValueError, match="longer than 64 bytes"):
        security.pack_hello(hello, NONCE)


@given(st.binary(min_size=48, max_size=48), st.binary(max_size=300))
def test_a_random_hello_is_refused_and_nothing_else(fixed: bytes, tail: bytes) -> None:
    with pytest.raises((FrameError, Refused)):
        security.hello_tail_bytes(fixed)
    as_hello = b"SMOL\x00\x03\x01" + fixed[7:]
    try:
        count = security.hello_tail_bytes(as_hello)
        security.unpack_hello(as_hello, tail[:count].ljust(count, b"\xff"))
    except FrameError:
        return
    assert count <= 2 * security.MAX_NAME_BYTES


@given(st.binary(min_size=40, max_size=40))
def test_a_random_reply_is_refused_and_nothing_else(reply: bytes) -> None:
    for candidate in (reply, b"SMOL\x00\x03" + reply[6:], b"SMOL" + reply[4:]):
        with pytest.raises((FrameError, AuthFailed)):
            security.check_accept(candidate, "tcp://somewhere:1", bytes(32))


def test_each_side_accepts_the_others_proof() -> None:
    proof = security.unpack_proof(security.pack_proof(TRANSCRIPT.proof(TOKEN, "dialler")))
    assert security.proofs_equal(proof, TRANSCRIPT.proof(TOKEN, "dialler"))
    expected = TRANSCRIPT.proof(TOKEN, "listener")
    security.check_accept(security.pack_accept(expected), "tcp://somewhere:1", expected)


def test_a_listener_without_the_token_is_found_out() -> None:
    accept = security.pack_accept(TRANSCRIPT.proof(b"another token of 28 letters!", "listener"))
    with pytest.raises(AuthFailed, match="does not know the cluster token"):
        security.check_accept(accept, "tcp://somewhere:1", TRANSCRIPT.proof(TOKEN, "listener"))


def test_a_listener_cannot_send_the_diallers_own_proof_back() -> None:
    reflected = security.pack_accept(TRANSCRIPT.proof(TOKEN, "dialler"))
    with pytest.raises(AuthFailed):
        security.check_accept(reflected, "tcp://somewhere:1", TRANSCRIPT.proof(TOKEN, "listener"))


@pytest.mark.parametrize(
    "other",
    [
        replace(TRANSCRIPT, dialler_nonce=OTHER_NONCE),
        replace(TRANSCRIPT, listener_nonce=NONCE),
        replace(TRANSCRIPT, dialler_nonce=OTHER_NONCE, listener_nonce=NONCE),
        replace(TRANSCRIPT, hello=replace(HELLO, rank=2)),
        replace(TRANSCRIPT, hello=replace(HELLO, lane="p2p:world")),
        replace(TRANSCRIPT, hello=replace(HELLO, run_id="run-8")),
        # the border between the two names is proved too
        replace(TRANSCRIPT, hello=replace(HELLO, lane="bulk:worldr", run_id="un-7")),
        replace(TRANSCRIPT, hello=replace(HELLO, to=0)),
        # neither can the two ranks change places
        replace(TRANSCRIPT, hello=replace(HELLO, rank=1, to=3)),
        replace(TRANSCRIPT, fingerprint=b"\x01" * 32),
    ],
)
def test_the_proof_covers_everything_that_was_said(other: Transcript) -> None:
    assert other.proof(TOKEN, "dialler") != TRANSCRIPT.proof(TOKEN, "dialler")


def test_the_proof_covers_role_token_and_protocol_version(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = {TRANSCRIPT.proof(TOKEN, role) for role in ("dialler", "listener", "session")}
    proofs.add(TRANSCRIPT.proof(b"another token of 28 letters!", "dialler"))
    monkeypatch.setattr(security, "PROTOCOL_VERSION", security.PROTOCOL_VERSION + 1)
    proofs.add(TRANSCRIPT.proof(TOKEN, "dialler"))
    assert len(proofs) == 5


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (security.REFUSED_VERSION, "another protocol version"),
        (security.REFUSED_TOKEN, "the cluster tokens differ"),
        (security.REFUSED_RUN, "another run"),
        (security.REFUSED_TAKEN, "this rank and lane already"),
        (security.REFUSED_RANK, "another rank than the one that was dialled"),
        (99, "reason 99"),
    ],
)
def test_a_refusal_says_why(reason: int, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        security.unpack_challenge(security.pack_refused(reason), "tcp://somewhere:1")
    assert caught.value.reason == reason
    assert "tcp://somewhere:1" in str(caught.value)
    assert caught.value.exit_code == 2


def test_another_program_on_the_port_is_recognised() -> None:
    with pytest.raises(FrameError, match="is another program on that port"):
        security.unpack_challenge(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(40), "tcp://somewhere:1")


def test_a_reply_of_another_version_is_a_refusal_even_if_it_is_no_refused() -> None:
    with pytest.raises(Refused, match="another protocol version"):
        security.unpack_challenge(b"SMOL\x00\x01\x02\x00" + NONCE, "tcp://somewhere:1")


def test_a_message_out_of_turn_is_refused() -> None:
    with pytest.raises(FrameError, match="message 4 where 2 belongs"):
        security.unpack_challenge(security.pack_accept(NONCE), "tcp://somewhere:1")
