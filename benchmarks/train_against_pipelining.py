"""mp_pipeline against torch.distributed.pipelining over gloo: a GPT of 8 blocks, 256 wide, on 16 x 128 bytes a step.

    python benchmarks/train_against_pipelining.py gpipe
    python benchmarks/train_against_pipelining.py 1f1b --micro-batches 4
    python benchmarks/train_against_pipelining.py 1f1b --host 198.18.0.{number} \
        --prefix "ip netns exec host{number} env GLOO_SOCKET_IFNAME=eth0"

Both sides have the same stages, micro-batches and schedule, in fp32, and use TCP, on loopback with the same congestion
control; `--link shm` gives ours shared memory, as ranks of one host have it by themselves. The model is cut by cost: a
block takes 12 D^2 products a token, the head V D, a twelfth of a block; so with two ranks each has four blocks. See
smolcluster.bench.pipelining for what torch's side does besides.

`--more` adds its pairs of blocks to those that the result has: results/train_pipelining_NAME.json, where NAME says all
that was chosen. benchmarks/pipelining_alone.py confirms the other side's figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict

from machine import save
from train_against_ddp import read_pairs

from smolcluster.bench.train import Measurement, Options, measure_training, summarise
from smolcluster.config.load import load_config

# Both sides take the same steps: a steady rate, as in train_against_fully_shard.py.
GPT = (
    "model.type=gpt", "model.model_dim=256", "model.num_layers=8", "model.num_heads=4", "model.ff_dim=1024",
    "model.dropout=0", "model.max_seq_len=128", "data.dataset=pydoc", "data.tokenizer=bytes",
    "training.batch_size=16", "training.max_steps=100000", "training.learning_rate=3e-4", "lr_schedule.kind=constant",
)  # fmt: skip
LINKS = {"tcp": "off", "shm": "auto"}
SCHEDULES = ("gpipe", "1f1b", "interleaved")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedule", choices=SCHEDULES)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--link", choices=list(LINKS), default="tcp", help="of our side")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=2, help="updates of a block")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="as of smolcluster train")
    parser.add_argument("--host", help="where a rank listens, with {number} from 1 on")
    parser.add_argument("--prefix", default="", help="what stands in front of a rank's command, with {number}")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--more", action="store_true", help="add to the pairs that the result has")
    arguments = parser.parse_args()
    overrides = [
        *GPT, f"training.schedule={arguments.schedule}", f"training.micro_batches={arguments.micro_batches}",
        f"cluster.shared_memory={LINKS[arguments.link]}", *arguments.override,
    ]  # fmt: skip
    config = load_config(overrides=overrides, flags={"algorithm": "mp_pipeline"}).config
    options = Options(
        "torch_pipelining",
        pairs=arguments.pairs,
        steps=arguments.steps,
        warmup_steps=1,
        congestion="default" if arguments.host else "equal",
    )
    chosen = f"{arguments.schedule}_m{arguments.micro_batches}_{arguments.link}_world{arguments.world}"
    name = f"train_pipelining_{arguments.name or chosen}"
    new = measure_training(
        config,
        arguments.world,
        options,
        hosts=[arguments.host.format(number=rank + 1) for rank in range(arguments.world)] if arguments.host else None,
        prefix=lambda rank: shlex.split(arguments.prefix.format(number=rank + 1)),
    )
    pairs = [*(read_pairs(name) if arguments.more else []), *new.pairs]
    both = Measurement(pairs, new.steps, new.congestion, new.parameters, new.losses)
    figures = {"schedule": arguments.schedule, **summarise(both, config, arguments.world, options)}
    print(json.dumps(figures, indent=2))
    save(name, {"figures": figures, "pairs": [asdict(pair) for pair in pairs]})


if __name__ == "__main__":
    main()
