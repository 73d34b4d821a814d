"""serve, generate and chat as a user runs them: real processes, real signals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from models.hf_folders import trained_folder

MODEL = "stories260K-hf"


@pytest.fixture
def model() -> Path:
    return trained_folder(MODEL)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from smolcluster.cli import main; main()", *map(str, arguments)]


def run(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input=given, capture_output=True, text=True, timeout=100, check=False)


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address."""
    process = subprocess.Popen(
        command("serve", "--port", 0, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while line.startswith("warning: "):
            line = process.stderr.readline()
        found = re.search(r"is served at (http://\S+);", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_conversation_with_a_model_in_stages_and_an_end(model: Path, end: signal.Signals) -> None:
    with serving("--model", model, "--local", 2) as (process, address):
        stages = psutil.Process(process.pid).children()
        assert len(stages) == 1
        talked = run(
            "chat", "--url", address, "--max-tokens", 30, "--seed", 1, given="Once upon a time\n\n/new\nTom\n/quit\n"
        )
        assert talked.returncode == 0, talked.stderr
        assert talked.stdout.startswith(f"{MODEL} at {address}. ")
        assert len(re.findall(r"\[30 tokens, the first after \d+ ms, [\d.]+ tokens per second\]", talked.stderr)) == 2
        process.send_signal(end)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert errors == ""
        deadline = time.monotonic() + 10
        while any(stage.is_running() for stage in stages) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(stage.is_running() for stage in stages)


def test_a_key_of_a_model_file_is_served_with_its_settings(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "first: {hf_model_name: nobody/nothing}\n"
        f"second: {{hf_model_name: {str(model)!r}, num_layers: 99, num_nodes: 2, max_new_tokens: 3, ctx_length: 100}}\n"
    )
    options = ("--model", "second", "--config", file)
    with serving(*options, "--local", 2) as (_, address):
        with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as answer:
            assert [entry["id"] for entry in json.load(answer)["data"]] == [MODEL]
        question = json.dumps({"model": MODEL, "prompt": "Once"}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", question, headers)) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
    alone = run("generate", *options, "--prompt", "Once")
    assert alone.returncode == 0, alone.stderr
    layers, nodes, tokens = alone.stderr.splitlines()
    assert re.fullmatch(rf"warning: serving\.num_layers is 99, but {MODEL} has \d+ layers, which count", layers)
    assert nodes == "serving.num_nodes is 2, but this is one process: 2 stages need --local 2"
    assert tokens.startswith("3 tokens, ")


def test_generate_writes_the_same_text_in_one_process_and_in_stages(model: Path) -> None:
    options = ("generate", "--model", model, "--prompt", "Once upon a time", "--max-tokens", 40, "--seed", 3)
    alone = run(*options, "--dtype", "fp64")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("Once upon a time")
    assert "40 tokens" in alone.stderr
    divided = run(*options, "--dtype", "fp64", "--local", 2)
    assert divided.returncode == 0, divided.stderr
    assert divided.stdout == alone.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "--prompt", "x"), "--model"),
        (("generate", "--prompt", "x", "--model", "/nowhere/at/all"), "--model is /nowhere/at/all"),
        (("serve", "--model", "./causal_gpt"), "nearest: causal_gpt2"),
        (("serve", "--model", "MODEL", "--device", "tpu"), "--device is 'tpu'"),
        (("serve", "--model", "MODEL", "--dtype", "fp8"), "fp64"),
        (("serve", "--model", "MODEL", "--local", 0), "--local 0"),
        (("serve", "--model", "MODEL", "--local", 2, "--split", "5"), "5 blocks"),
        (("serve", "--model", "MODEL", "--split", "a,b"), "6,5,1"),
        (("serve", "--model", "MODEL", "--host", "192.0.2.1"), "192.0.2.1"),
        (("serve", "--model", "MODEL", "--api-key-file", "/nowhere"), "/nowhere"),
        (("serve", "--model", "MODEL", "--override", "serving.sessions_file=MODEL"), "serving.sessions_file"),
        (("serve", "--model", "MODEL", "--override", "serving.sessions_file=MODEL/config.json"), "not a database"),
        (("chat", "--url", "ftp://x"), "--url"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(model: Path, arguments: tuple[object, ...], says: str) -> None:
    done = run(*(str(argument).replace("MODEL", str(model)) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_says_that_nobody_answers() -> None:
    done = run("chat", "--url", "http://127.0.0.1:9")
    assert done.returncode == 3
    assert "does not answer" in done.stderr


def test_without_the_extra_generate_works_and_serve_names_it(model: Path) -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(('fastapi', 'uvicorn', 'starlette', 'prometheus_client')))"

    def run_without(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = f"{without}; from smolcluster.cli import main; main()"
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)

    done = run_without("generate", "--model", model, "--prompt", "Tom", "--max-tokens", 3)
    assert (done.returncode, done.stdout[:3]) == (0, "Tom"), done.stderr
    refused = run_without("serve", "--model", model)
    assert refused.returncode == 2
    assert "smolcluster[serve]" in refused.stderr
