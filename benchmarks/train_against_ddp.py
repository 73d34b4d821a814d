"""Training against torch's DistributedDataParallel over gloo: a GPT of 6 layers, 256 wide, on bytes, 8 x 128 a rank.

    python benchmarks/train_against_ddp.py fp32
    python benchmarks/train_against_ddp.py bf16
    python benchmarks/train_against_ddp.py int8 --host 198.18.0.{number} \
        --prefix "ip netns exec host{number} env GLOO_SOCKET_IFNAME=eth0"

fp32 and bf16: two ranks of this machine, the same congestion control for both sides, fp32 gradients on the wire in
both; bf16 is autocast. int8: our gradients are int8, DDP's fp32; for two hosts (network namespaces will do) that a slow
link joins. `--host` and `--prefix` say where rank 0 (number 1) and rank 1 (number 2) are, and how a process is started
there.

`--more` adds its pairs of blocks to those that results/train_NAME.json has. See smolcluster.bench.train.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from machine import RESULTS, save

from smolcluster.bench.train import Block, Measurement, Options, Pair, measure_training, summarise
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config

WORLD_SIZE = 2
GPT = (
    "model.type=gpt", "model.model_dim=256", "model.num_layers=6", "model.num_heads=4", "model.ff_dim=1024",
    "model.dropout=0", "model.max_seq_len=128", "data.dataset=pydoc", "data.tokenizer=bytes",
    "training.batch_size=8", "training.max_steps=100000",
)  # fmt: skip
# A fixed number of updates in a block, so that pairs of several runs are alike.
SETTINGS: dict[str, tuple[tuple[str, ...], Options]] = {
    "fp32": ((), Options("ddp", pairs=10, steps=3)),
    "bf16": (("training.precision=bf16",), Options("ddp", pairs=10, steps=5)),
    "int8": (
        ("cluster.compression=int8", "cluster.shared_memory=off"),
        Options("ddp", pairs=10, steps=2, warmup_steps=1, congestion="default", exposed=False),
    ),
}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--pairs", type=int, help="pairs of blocks")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="as of smolcluster train")
    parser.add_argument("--host", help="where a rank listens, with {number} of 1 or 2")
    parser.add_argument("--prefix", default="", help="what stands in front of a rank's command, with {number}")
    parser.add_argument("--name", help="of the result; default: the setting's")
    parser.add_argument("--more", action="store_true", help="add to the pairs that the result has")
    arguments = parser.parse_args()
    overrides, options = SETTINGS[arguments.setting]
    name = f"train_{arguments.name or arguments.setting}"
    options = Options(**{**asdict(options), **({"pairs": arguments.pairs} if arguments.pairs else {})})
    config = load_config(overrides=[*GPT, *overrides, *arguments.override], flags={"algorithm": "classicdp"}).config
    measurement = measure_training(
        config,
        WORLD_SIZE,
        options,
        hosts=[arguments.host.format(number=rank + 1) for rank in range(WORLD_SIZE)] if arguments.host else None,
        prefix=lambda rank: shlex.split(arguments.prefix.format(number=rank + 1)),
    )
    before = read_pairs(name) if arguments.more else []
    figures = pooled(measurement, before, config, options)
    print(json.dumps(figures, indent=2))
    save(name, {"figures": figures, "pairs": [asdict(pair) for pair in [*before, *measurement.pairs]]})


def read_pairs(name: str) -> list[Pair]:
    """What an earlier run measured."""
    kept: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["pairs"]
    return [Pair(**{side: block and Block(**block) for side, block in pair.items()}) for pair in kept]


def pooled(new: Measurement, before: Sequence[Pair], config: Config, options: Options) -> dict[str, Any]:
    """The figures of all pairs."""
    both = Measurement([*before, *new.pairs], new.steps, new.congestion, new.parameters, new.losses)
    return summarise(both, config, WORLD_SIZE, options)


if __name__ == "__main__":
    main()
