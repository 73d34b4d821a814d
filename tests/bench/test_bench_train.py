"""`smolcluster bench train`: what it refuses, what it makes of measured blocks, and one real measurement."""

import json
import math
import os
import socket
import sys
from pathlib import Path

import pytest

from smolcluster import cli
from smolcluster.bench import congestion
from smolcluster.bench.train import Block, Measurement, Options, Pair, summarise
from smolcluster.config.load import load_config

DIGITS = ["--preset", "classicdp_digits", "--override", "training.device=cpu"]


def run(*arguments: str) -> int:
    """A command in this process, without the exit that ends `main`."""
    return cli._run(["bench", "train", *arguments], "smolcluster")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "classicdp"], "'--local'"),
        (["--algorithm", "classicdp", "--local", "0"], "--local 0: give the number of ranks"),
        (["--algorithm", "classicdp", "--local", "2", "--against", "torch_pipelining"], "for --algorithm mp_pipeline"),
        (["--algorithm", "classicdp", "--local", "2", "--against", "horovod"], "torch_pipelining or single"),
        (["--algorithm", "ep", "--local", "2"], "Set model.type to moe"),
        (["--algorithm", "single", "--local", "2"], "single is one process"),
        (["--algorithm", "classicdp", "--local", "2", "--congestion", "bbr"], "Use equal or default"),
        (["--algorithm", "classicdp", "--local", "2", "--preset", "classicdp_digit"], "classicdp_digits"),
        (["--algorithm", "classicdp", "--local", "2", "--pairs", "1"], "'--pairs'"),
    ],
)
def test_what_a_user_can_mend_exits_2_on_one_or_two_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert message in err
    assert out == ""


@pytest.mark.slow
def test_a_measurement_prints_the_keys_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--local", "2", "--pairs", "2", "--steps", "2"]
    code = run(*DIGITS, "--algorithm", "classicdp", "--against", "ddp", *size, "--json")
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert result["ratio"] > 0
    assert result["tokens_per_s"] > 0
    assert result["against_tokens_per_s"] > 0
    assert result["world"] == 2
    assert result["pairs"] == 2
    # Both did the same updates on the same batches: else something else was compared. Rounding is all that differs.
    losses = result["losses"]
    assert losses["ours"] == pytest.approx(losses["against"], rel=1e-3)


def test_data_that_is_missing_is_the_users_to_mend(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["data.dataset=text", f"data.path={tmp_path / 'absent.txt'}", "model.type=gpt"]
    options = [part for override in overrides for part in ("--override", override)]
    assert run("--algorithm", "single", "--local", "1", *options) == 2
    assert "absent.txt" in capsys.readouterr().err


def measured(*pairs: tuple[float, float, float, float]) -> Measurement:
    """Blocks of 100 tokens and 2 steps, from seconds (ours, against, ours alone, against alone)."""
    return Measurement([Pair(*(Block(seconds, 100) for seconds in pair)) for pair in pairs], 2, "cubic", 7, {})


def test_figures_are_medians_over_pairs() -> None:
    config = load_config(flags={"algorithm": "classicdp"}).config
    measurement = measured((1.0, 1.2, 0.9, 1.0), (2.0, 2.2, 1.8, 2.0), (4.0, 5.2, 3.7, 4.2))
    figures = summarise(measurement, config, 2, Options("ddp"))
    expected = {
        "tokens_per_s": 50.0,
        "against_tokens_per_s": 100 / 2.2,
        "ratio": 1.2,  # of 1.2, 1.1 and 1.3
        "step_s": 1.0,
        "exposed_s": 0.1,  # of 0.1, 0.2 and 0.3, over two steps
        "against_exposed_s": 0.1,  # of 0.2, 0.2 and 1.0
        "exposed_ratio": 1.0,
    }
    for key, value in expected.items():
        figure = figures[key]
        assert isinstance(figure, float)
        assert math.isclose(figure, value, rel_tol=1e-9), key


def test_without_a_competitor_there_is_only_our_speed() -> None:
    config = load_config(flags={"algorithm": "classicdp"}).config
    pairs = [Pair(Block(2.0, 100)), Pair(Block(4.0, 100))]
    figures = summarise(Measurement(pairs, 2, "cubic", 7, {}), config, 2, Options())
    assert figures["tokens_per_s"] == 37.5
    assert "ratio" not in figures
    assert "against_tokens_per_s" not in figures
    assert "exposed_s" not in figures


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="this system has no TCP_CONGESTION")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are found through /proc")
def test_equalise_sets_the_congestion_control_of_every_tcp_socket() -> None:
    which = "available" if os.geteuid() == 0 else "allowed"
    settable = Path(f"/proc/sys/net/ipv4/tcp_{which}_congestion_control").read_text().split()
    wanted = next((name for name in ("reno", "cubic") if name in settable), None)
    other = next((name for name in settable if name != wanted), None)
    if wanted is None or other is None:
        pytest.skip(f"the congestion controls that may be set here are {settable}")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, other.encode())
        accepted, _ = server.accept()
        with accepted:
            name = congestion.equalise()
            for end in (sock, accepted):
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode() == name
            assert name == wanted
            sock.sendall(b"still open")  # what was looked at are copies of the descriptors
            assert accepted.recv(16) == b"still open"
