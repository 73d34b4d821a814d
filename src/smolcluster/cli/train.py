"""`smolcluster train` and `smolcluster node`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from smolcluster.errors import ConfigError

if TYPE_CHECKING:
    from smolcluster.config.schema import Config
    from smolcluster.kinds import JsonObject
    from smolcluster.monitoring.reporters import Reporter
    from smolcluster.run.folder import Ran

Algorithm: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="How the work is spread: single, classicdp.")
]
Preset: TypeAlias = Annotated[str | None, typer.Option(metavar="NAME", help="Start from this preset.")]
ConfigFiles: TypeAlias = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="YAML file; later ones win.")]
ClusterFile: TypeAlias = Annotated[Path | None, typer.Option(metavar="FILE", help="The machines and how they talk.")]
Overrides: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Set one key, value as YAML.")
]
Local: TypeAlias = Annotated[int | None, typer.Option(metavar="N", help="N ranks as N processes of this machine.")]
BackendName: TypeAlias = Annotated[str | None, typer.Option(metavar="tcp|gloo|nccl", help="What carries tensors.")]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The run folder. Default: runs/<algorithm>-<model>-<time>.")
]
MaxSteps: TypeAlias = Annotated[int | None, typer.Option(metavar="N", help="Stop after so many updates.")]
TokenFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The cluster token. Default: SMOLCLUSTER_TOKEN, or the config folder."),
]
SkipNonfinite: TypeAlias = Annotated[
    bool, typer.Option("--skip-nonfinite", help="Pass over updates that are not finite instead of stopping.")
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
# Accepted so that a script written for a later release is told so, instead of "no such option".
LATER = "Comes in a later release."
Resume: TypeAlias = Annotated[str | None, typer.Option(metavar="latest|PATH", help=LATER)]
Respawn: TypeAlias = Annotated[bool, typer.Option("--respawn", help=LATER)]
Replay: TypeAlias = Annotated[str | None, typer.Option(metavar="RUN", help=LATER)]
Trace: TypeAlias = Annotated[bool, typer.Option("--trace", help=LATER)]
Tui: TypeAlias = Annotated[bool, typer.Option("--tui", help=LATER)]
Dashboard: TypeAlias = Annotated[bool, typer.Option("--dashboard", help=LATER)]
MetricsPort: TypeAlias = Annotated[int | None, typer.Option(metavar="PORT", help=LATER)]


def train(
    algorithm: Algorithm = None,
    preset: Preset = None,
    config: ConfigFiles = None,
    cluster: ClusterFile = None,
    override: Overrides = None,
    local: Local = None,
    backend: BackendName = None,
    out: Out = None,
    max_steps: MaxSteps = None,
    token_file: TokenFile = None,
    skip_nonfinite: SkipNonfinite = False,
    quiet: Quiet = False,
    resume: Resume = None,
    respawn: Respawn = False,
    replay: Replay = None,
    trace: Trace = False,
    tui: Tui = False,
    dashboard: Dashboard = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Train a model: in one process, in N processes of this machine (--local N), or as one process of a launcher.

    With a cluster file start one `smolcluster node` on each machine instead.
    """
    refuse_later(resume=resume, respawn=respawn, replay=replay, trace=trace, tui=tui, dashboard=dashboard,
                 metrics_port=metrics_port)  # fmt: skip
    resolved = resolve(preset, config, cluster, override, algorithm, backend, max_steps, quiet)
    from smolcluster.run.folder import default_out
    from smolcluster.run.launcher import launch_from_environment

    folder = out or default_out(resolved)
    launch = None if local is not None else launch_from_environment()
    if local is not None:
        if local < 1:
            raise ConfigError(f"--local {local}: give the number of ranks, 1 or more")
        from smolcluster.run.local import run_local

        ran = run_local(resolved, local, folder, reporter(resolved, quiet), skip_nonfinite=skip_nonfinite)
    else:
        from smolcluster.run.node import NodeOptions, run_alone, run_launched

        shows = launch is None or launch.rank == 0  # a launcher mixes the output of all ranks
        options = NodeOptions(folder, reporter(resolved, quiet or not shows), token_file, skip_nonfinite)
        if launch is not None:
            ran = run_launched(resolved, launch, options)
        else:
            refuse_machines(resolved)
            ran = run_alone(resolved, options)
    conclude(ran, resolved, quiet)


def node(
    hostname: Annotated[str, typer.Option(metavar="NAME", help="This machine's name in the cluster file.")],
    cluster: ClusterFile = None,
    algorithm: Algorithm = None,
    preset: Preset = None,
    config: ConfigFiles = None,
    override: Overrides = None,
    backend: BackendName = None,
    out: Out = None,
    max_steps: MaxSteps = None,
    token_file: TokenFile = None,
    skip_nonfinite: SkipNonfinite = False,
    quiet: Quiet = False,
    resume: Resume = None,
    respawn: Respawn = False,
    replay: Replay = None,
    trace: Trace = False,
    tui: Tui = False,
    dashboard: Dashboard = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Be one machine of a cluster. Start it on every machine, in any order, with the same options."""
    refuse_later(resume=resume, respawn=respawn, replay=replay, trace=trace, tui=tui, dashboard=dashboard,
                 metrics_port=metrics_port)  # fmt: skip
    resolved = resolve(preset, config, cluster, override, algorithm, backend, max_steps, quiet)
    from smolcluster.run.folder import default_out
    from smolcluster.run.node import NodeOptions, run_node

    options = NodeOptions(out or default_out(resolved), reporter(resolved, quiet), token_file, skip_nonfinite)
    conclude(run_node(resolved, hostname, options, say_to_stderr(quiet)), resolved, quiet)


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """A function that shows a line to the user; with --quiet one that does not."""

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    return say


def refuse_later(**options: object) -> None:
    """Name the first option that a later release brings.

    Raises:
        ConfigError: one of them was given.
    """
    for name, value in options.items():
        if value not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} comes in a later release. Leave it out")


def resolve(
    preset: str | None,
    config: list[Path] | None,
    cluster: Path | None,
    override: list[str] | None,
    algorithm: str | None,
    backend: str | None,
    max_steps: int | None,
    quiet: bool,
) -> Config:
    """The configuration that the options give; warnings go to stderr."""
    from smolcluster.config.load import load_config

    flags: Mapping[str, Any] = {"algorithm": algorithm, "backend": backend, "training.max_steps": max_steps}
    resolved = load_config(preset, config or (), [cluster] if cluster else (), override or (), flags)
    if not quiet:
        for warning in resolved.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return resolved.config


def reporter(config: Config, quiet: bool) -> Reporter:
    """What shows the run's progress on stderr."""
    from smolcluster.monitoring.reporters import make_reporter
    from smolcluster.run.folder import rate_unit

    return make_reporter(quiet, config.logging.log_interval, rate_unit(config))


def refuse_machines(config: Config) -> None:
    """A run over several machines or ranks is not started by `train` alone.

    Raises:
        ConfigError: the configuration asks for one.
    """
    from smolcluster.run.support import check_supported

    if config.algorithm == "single":
        return
    check_supported(config, 1)
    topology = config.cluster.allToAllTopology
    machines = len(topology.workers.regular) if topology is not None else len(config.cluster.host_ip)
    count = config.cluster.num_workers or machines
    if machines > 1:
        raise ConfigError(
            f"the cluster has {machines} machines: start each with smolcluster node --cluster FILE --hostname NAME, or "
            f"stay on this machine with --local {count}"
        )
    if count > 1:
        raise ConfigError(f"cluster.num_workers is {count}, but no machines are named. Use --local {count}")


def conclude(ran: Ran, config: Config, quiet: bool) -> None:
    """Print what a run gave, and end the command with its exit code."""
    if ran.error is not None:
        print(f"error: {ran.error}", file=sys.stderr)
        _point_at_checkpoint(ran)
    if ran.summary is not None and ran.error is None and not quiet:
        for line in result_lines(ran.summary, config):
            print(line)
        if ran.exit_code != 0:
            print("stopped before the last step, as asked")
        print(f"run folder: {ran.out}")
    raise typer.Exit(ran.exit_code)


def result_lines(summary: JsonObject, config: Config) -> list[str]:
    """What a run gave, in words."""
    from smolcluster.run.folder import loss_unit, rate_unit

    world_size = summary["world_size"]
    where = "one process" if world_size == 1 else f"{world_size} ranks over {config.backend}"
    head = f"{config.algorithm}, {config.model.type} on {config.data.dataset}, {where}: {summary['steps']} steps"
    if isinstance(rate := summary["tokens_per_s"], float):
        head += f" in {summary['wall_s']:.1f} s, {rate:,.0f} {rate_unit(config)}/s"
    losses = []
    if isinstance(loss := summary["train_loss"], float):
        losses.append(f"training loss {loss:.4f}")
    if isinstance(loss := summary["val_loss"], float):
        losses.append(f"validation loss {loss:.4f} {loss_unit(config)}")
    if isinstance(accuracy := summary["val_accuracy"], float):
        losses.append(f"accuracy {100 * accuracy:.2f} %")
    return [head, ", ".join(losses)] if losses else [head]


def _point_at_checkpoint(ran: Ran) -> None:
    """After a failure: what is left of the run."""
    if ran.out is None:
        return
    latest = ran.out / "checkpoints" / "latest"
    if latest.is_file():
        print(f"the newest checkpoint is {latest.parent / latest.read_text().strip()}", file=sys.stderr)
