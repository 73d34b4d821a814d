"""`smolcluster bench`: how fast this machine trains, beside what people would use instead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, cast

import typer

from smolcluster.cli.train import Algorithm, BackendName, Choices, ConfigFiles, Overrides, Preset
from smolcluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smolcluster.kinds import JsonObject

app = typer.Typer(name="bench", help="Measure speed, alternating with a competitor.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Congestion = Annotated[
    str,
    typer.Option(
        metavar="equal|default",
        help="equal: both get the congestion control that our loopback sockets choose; default: each keeps its own.",
    ),
]


@app.callback()
def bench() -> None:
    """Measure speed, alternating with a competitor."""


@app.command("train")
def train(
    local: Annotated[int, typer.Option(metavar="N", help="N ranks as N processes of this machine.")],
    algorithm: Algorithm = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ddp|fully_shard|torch_pipelining|single",
            help="Over gloo: torch's DistributedDataParallel, with fsdp fully_shard, with mp_pipeline "
            "torch.distributed.pipelining. Or one process by itself.",
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFiles = None,
    override: Overrides = None,
    backend: BackendName = None,
    congestion: Congestion = "equal",
    pairs: Annotated[int | None, typer.Option(metavar="N", help="Blocks of each side. Default: 20.", min=2)] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Updates of a block. Default: about a second.", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens (images: samples) per second of a training run, in blocks that alternate with a competitor's.

    Takes the configuration of `smolcluster train`. Nothing is written.
    """
    if local < 1:
        raise ConfigError(f"--local {local}: give the number of ranks, 1 or more")
    check_congestion(congestion)
    from smolcluster.bench.train import PAIRS, Options, bench_train, check_competitor

    check_competitor(against)
    resolved = Choices(preset, config, None, override, algorithm, backend, None, as_json).resolve()
    options = Options(against, PAIRS if pairs is None else pairs, steps, congestion=congestion)
    result = bench_train(resolved.config, local, options)
    if as_json:
        print(json.dumps(result))
        return
    from smolcluster.run.folder import rate_unit

    for line in train_lines(result, rate_unit(resolved.config)):
        print(line)


@app.command("generate")
def generate(
    model: Annotated[str, typer.Option(metavar="FOLDER_OR_HF_ID", help="The model.")],
    local: Annotated[int, typer.Option(metavar="N", help="Stages, each a process of this machine.", min=1)] = 1,
    against: Annotated[str | None, typer.Option(metavar="hf", help="A competitor: transformers' generate.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of ours: fp32, int8, …")] = "fp32",
    streams: Annotated[int, typer.Option(metavar="N", help="Texts at once.", min=1)] = 1,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of each text's beginning.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens that are written.", min=2)] = 64,
    pairs: Annotated[int | None, typer.Option(metavar="N", help="Blocks of each side. Default: 7.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second that a model writes through the whole engine, in blocks that alternate with a competitor's."""
    from smolcluster.bench.generate import PAIRS, Options, bench_generate, generate_lines

    options = Options(against, local, dtype, streams, prompt, tokens, PAIRS if pairs is None else pairs)
    result = bench_generate(model, options)
    if as_json:
        print(json.dumps(result))
        return
    for line in generate_lines(result):
        print(line)


@app.command("all-reduce")
def all_reduce(
    world: Annotated[int, typer.Option(metavar="N", help="Ranks, each a process of this machine.")] = 2,
    sizes: Annotated[str, typer.Option(help="Bytes of the tensors, such as 4KiB,1MiB.")] = "4KiB,256KiB,4MiB,64MiB",
    against: Annotated[str | None, typer.Option(metavar="gloo", help="A competitor.")] = None,
    compression: Annotated[str, typer.Option(metavar="none|bf16|fp16|int8", help="Of our bytes.")] = "none",
    dtype: Annotated[str, typer.Option(metavar="float32|float64", help="Of the tensors.")] = "float32",
    congestion: Congestion = "equal",
    link: Annotated[
        str, typer.Option(metavar="tcp|shm", help="Loopback TCP, or shared memory, which --local ranks use.")
    ] = "tcp",
    runs: Annotated[int | None, typer.Option(metavar="N", help="Blocks of each side. Default: 9.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds of an all-reduce, in blocks that alternate with gloo's. Real processes; every result is checked."""
    check_congestion(congestion)
    from smolcluster.bench.all_reduce import RUNS, Options, bench_all_reduce, parse_sizes

    options = Options(
        parse_sizes(sizes), against, compression, dtype, congestion, link, RUNS if runs is None else runs
    )  # fmt: skip
    rows = bench_all_reduce(world, options)
    if as_json:
        print(json.dumps(rows))
        return
    print(all_reduce_table(rows))


def all_reduce_table(rows: Sequence[JsonObject]) -> str:
    """What was measured, as a table."""

    def cell(value: object) -> str:
        return f"{value:10.3f}" if isinstance(value, float) else " " * 9 + "-"

    lines = [f"{'bytes':>12} {'ours ms':>10} {'gloo ms':>10} {'ratio':>10}"]
    for row in rows:
        lines.append(f"{row['bytes']:>12} {cell(row['tcp_ms'])} {cell(row['gloo_ms'])} {cell(row['ratio'])}")
    last = rows[-1]
    return "\n".join([*lines, f"world {last['world']}, {last['link']}, congestion control {last['congestion']}"])


def train_lines(result: JsonObject, unit: str) -> list[str]:
    """What was measured, in words; `unit`: what is trained on, tokens or samples."""

    def number(key: str) -> float:
        return cast("float", result[key])

    lines = [f"{result['algorithm']}, {result['world']} ranks: {number('tokens_per_s'):,.0f} {unit}/s"]
    if "ratio" in result:
        low, high = cast("list[float]", result["ratio_interval"])
        lines.append(
            f"{result['against']}: {number('against_tokens_per_s'):,.0f} {unit}/s; ratio {number('ratio'):.3f}, 95 % "
            f"interval {low:.3f} to {high:.3f}, {result['pairs']} pairs of blocks"
        )
    if "exposed_s" in result:
        ours, theirs = 1e3 * number("exposed_s"), 1e3 * number("against_exposed_s")
        lines += [f"exposed communication of a step: {ours:.1f} ms; {result['against']} {theirs:.1f} ms"]
        lines += [f"({result['exposed']})"]
    return lines


def check_congestion(name: str) -> None:
    """Refuse what is neither `equal` nor `default`.

    Raises:
        ConfigError: it is neither.
    """
    if name not in ("equal", "default"):
        raise ConfigError(f"--congestion {name} is unknown. Use equal or default")
