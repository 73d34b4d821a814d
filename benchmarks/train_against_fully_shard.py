"""Training with fsdp against torch's fully_shard (FSDP2) over gloo: the GPT and the batches of train_against_ddp.py.

    python benchmarks/train_against_fully_shard.py fp32 --stage 3
    python benchmarks/train_against_fully_shard.py bf16 --stage 2 --world 3
    python benchmarks/train_against_fully_shard.py fp32 --stage 3 --host 198.18.0.{number} \
        --prefix "ip netns exec host{number} env GLOO_SOCKET_IFNAME=eth0"

Both sides use TCP, on loopback with the same congestion control; `--link shm` gives ours shared memory, as ranks of one
host have it by themselves. bf16 is autocast on our side, and MixedPrecisionPolicy on the other; both gather parameters
in bf16 and sum gradients in fp32. `--stage` 3 is fully_shard's default, 2 reshard_after_forward=False; see
smolcluster.bench.fully_shard. `--host` and `--prefix` are for hosts that links join, as in train_against_ddp.py.

`--more` adds its pairs of blocks to those that the result has: results/train_fully_shard_NAME.json, where NAME says all
that was chosen. benchmarks/fully_shard_alone.py confirms the other side's figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict

from machine import save
from train_against_ddp import GPT, read_pairs

from smolcluster.bench.train import Measurement, Options, measure_training, summarise
from smolcluster.config.load import load_config

LINKS = {"tcp": "off", "shm": "auto"}
# Both sides take the same steps: with a higher rate this GPT's loss jumps in its first updates, in bf16 at others than
# in fp32, and the comparison of the losses would say nothing.
STEADY = ("training.learning_rate=3e-4", "lr_schedule.kind=constant")
# A fixed number of updates in a block, so that pairs of several runs are alike.
STEPS = {"fp32": 3, "bf16": 5}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=list(STEPS))
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--link", choices=list(LINKS), default="tcp", help="of our side")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--steps", type=int, help="updates of a block")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="as of smolcluster train")
    parser.add_argument("--host", help="where a rank listens, with {number} from 1 on")
    parser.add_argument("--prefix", default="", help="what stands in front of a rank's command, with {number}")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--more", action="store_true", help="add to the pairs that the result has")
    arguments = parser.parse_args()
    overrides = [
        *GPT, f"training.precision={arguments.precision}", f"cluster.fsdp_stage={arguments.stage}",
        f"cluster.shared_memory={LINKS[arguments.link]}", *STEADY, *arguments.override,
    ]  # fmt: skip
    config = load_config(overrides=overrides, flags={"algorithm": "fsdp"}).config
    options = Options(
        "fully_shard",
        pairs=arguments.pairs,
        steps=arguments.steps or STEPS[arguments.precision],
        congestion="default" if arguments.host else "equal",
    )
    chosen = f"{arguments.precision}_stage{arguments.stage}_{arguments.link}_world{arguments.world}"
    name = f"train_fully_shard_{arguments.name or chosen}"
    ranks = range(arguments.world)
    new = measure_training(
        config,
        arguments.world,
        options,
        hosts=[arguments.host.format(number=rank + 1) for rank in ranks] if arguments.host else None,
        prefix=lambda rank: shlex.split(arguments.prefix.format(number=rank + 1)),
    )
    pairs = [*(read_pairs(name) if arguments.more else []), *new.pairs]
    both = Measurement(pairs, new.steps, new.congestion, new.parameters, new.losses)
    figures = {"stage": arguments.stage, **summarise(both, config, arguments.world, options)}
    print(json.dumps(figures, indent=2))
    save(name, {"figures": figures, "pairs": [asdict(pair) for pair in pairs]})


if __name__ == "__main__":
    main()
