"""`bench generate`: both sides write, and what is told fits together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.hf_folders import make_hf_folder
from smolcluster.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf_folder(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=64)
    ByteTokenizer().save(folder)
    return folder


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from smolcluster.cli import main; main()"
    line = [sys.executable, "-c", code, "bench", "generate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)


def test_both_sides_are_measured(folder: Path) -> None:
    few = ("--model", folder, "--tokens", 6, "--prompt", 5, "--pairs", 3)
    done = bench(*few, "--against", "hf", "--streams", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens_per_s"] > 0
    assert result["against_tokens_per_s"] > 0
    low, high = result["ratio_interval"]
    assert low <= result["ratio"] <= high
    assert (result["streams"], result["threads"], result["pairs"]) == (2, 1, 3)
    divided = bench(*few, "--local", 2)
    assert divided.returncode == 0, divided.stderr
    assert "2 stages, 1 streams" in divided.stdout


def test_an_unknown_competitor_is_refused(folder: Path) -> None:
    done = bench("--model", folder, "--against", "vllm")
    assert done.returncode == 2
    assert "--against vllm" in done.stderr
