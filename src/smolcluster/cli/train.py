"""`smolcluster train` and `smolcluster node`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias

import typer

from smolcluster.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from smolcluster.config.load import Resolved
    from smolcluster.config.schema import Config
    from smolcluster.kinds import JsonObject
    from smolcluster.monitoring.reporters import Reporter
    from smolcluster.run.folder import Ran
    from smolcluster.run.resume import ResumePoint

Algorithm: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="How the work is spread: single, classicdp, syncps, edp.")
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
Resume: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="latest|PATH", help="Go on from a checkpoint: the newest one, or this run or checkpoint."),
]
Trace: TypeAlias = Annotated[
    bool, typer.Option("--trace", help="Write trace.json: what all ranks computed and sent, for ui.perfetto.dev.")
]
# Accepted so that a script written for a later release is told so, instead of "no such option".
LATER = "Comes in a later release."
Respawn: TypeAlias = Annotated[bool, typer.Option("--respawn", help="With --local: start ranks that die again.")]
Replay: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Repeat a run of edp in one process, from its application log."),
]
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
    refuse_later(tui=tui, dashboard=dashboard, metrics_port=metrics_port)
    if replay is not None:
        replay_alone(replay, algorithm, out, quiet)
    if respawn and local is None:
        raise ConfigError("--respawn starts processes of this machine again: give --local N with it")
    from smolcluster.run.launcher import launch_from_environment

    launch = None if local is not None else launch_from_environment()
    leads = launch is None or launch.rank == 0
    quiet = quiet or not leads  # a launcher mixes the output of all ranks
    chosen = Choices(preset, config, cluster, override, algorithm, backend, max_steps, quiet)
    resolved, point, folder = plan(chosen, resume, out, leads=leads)
    if local is not None:
        if local < 1:
            raise ConfigError(f"--local {local}: give the number of ranks, 1 or more")
        from smolcluster.config.memory import local_memory_warning
        from smolcluster.run.local import run_local

        note_batch(point, resolved, local, quiet)
        say_stages(chosen, resolved, local)
        if (too_large := local_memory_warning(resolved, local)) is not None:
            chosen.say(f"warning: {too_large}")
        ran = run_local(
            resolved, local, folder, reporter(resolved, quiet), resume=point, skip_nonfinite=skip_nonfinite,
            trace=trace, respawn=respawn,
        )  # fmt: skip
    else:
        from smolcluster.run.node import NodeOptions, run_alone, run_launched

        options = NodeOptions(folder, reporter(resolved, quiet), token_file, point, skip_nonfinite, trace)
        if launch is not None:
            note_batch(point, resolved, launch.world_size, quiet)
            say_stages(chosen, resolved, launch.world_size)
            ran = run_launched(resolved, launch, options)
        else:
            refuse_machines(resolved)
            note_batch(point, resolved, 1, quiet)
            ran = run_alone(resolved, options)
    conclude(ran, resolved, quiet)


def replay_alone(run: Path, algorithm: str | None, out: Path | None, quiet: bool) -> NoReturn:
    """Repeat a run, and end the command."""
    if algorithm not in (None, "single"):
        raise ConfigError(f"--replay repeats a run in one process: leave out --algorithm {algorithm}, or give single")
    from smolcluster.config.load import load_config
    from smolcluster.run.folder import default_out
    from smolcluster.run.replay import run_replay

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"--replay {run}: there is no run folder. Give the folder of a run of edp")
    config = load_config(files=[run / "config.yaml"], flags={"algorithm": "single"}).config
    conclude(run_replay(run, out or default_out(config), reporter(config, quiet)), config, quiet)


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
    if replay is not None:
        raise ConfigError("--replay repeats a run in one process: give it to smolcluster train")
    refuse_later(respawn=respawn, tui=tui, dashboard=dashboard, metrics_port=metrics_port)
    chosen = Choices(preset, config, cluster, override, algorithm, backend, max_steps, quiet)
    from smolcluster.config.hosts import host_names
    from smolcluster.run.node import NodeOptions, run_node
    from smolcluster.run.support import PARAMETER_SERVERS

    # Only rank 0's machine has the run folder, so the others may not find what --resume names.
    resolved, point, folder = plan(chosen, resume, out, leads=False)
    names = host_names(resolved)
    if resume is not None and point is None and names[:1] == (hostname,):
        resolved, point, folder = plan(chosen, resume, out, leads=True)
    elif resume is not None and point is None:
        chosen.say("rank 0's machine has the run that goes on; this one takes the settings that are given here")
    note_batch(point, resolved, len(names) if point is not None else 1, quiet)
    say_stages(chosen, resolved, len(names))
    options = NodeOptions(folder, reporter(resolved, quiet), token_file, point, skip_nonfinite, trace)
    run = run_node
    if resolved.algorithm in PARAMETER_SERVERS:
        from smolcluster.run.param_server_node import run_param_server_node

        run = run_param_server_node
    conclude(run(resolved, hostname, options, say_to_stderr(quiet)), resolved, quiet)


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


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user says of the configuration."""

    preset: str | None
    config: list[Path] | None
    cluster: Path | None
    override: list[str] | None
    algorithm: str | None
    backend: str | None
    max_steps: int | None
    quiet: bool

    def resolve(self, base: tuple[Config, str] | None = None) -> Resolved:
        """The configuration that this gives, over the defaults or over that of a run that goes on."""
        from smolcluster.config.load import load_config

        flags: Mapping[str, Any] = {
            "algorithm": self.algorithm,
            "backend": self.backend,
            "training.max_steps": self.max_steps,
        }
        clusters = [self.cluster] if self.cluster else ()
        return load_config(self.preset, self.config or (), clusters, self.override or (), flags, base=base)

    def say(self, text: str) -> None:
        """Show a line on stderr, unless asked to be quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)


def plan(
    chosen: Choices, resume: str | None, out: Path | None, *, leads: bool
) -> tuple[Config, ResumePoint | None, Path]:
    """The configuration, the checkpoint to go on from, and the run folder.

    Args:
        chosen: what the user says of the configuration.
        resume: `--resume`.
        out: `--out`.
        leads: this process owns the run folder. Others follow rank 0 if they do not find the checkpoint.

    Raises:
        ConfigError: the configuration is wrong, or not that of the run that goes on.
        CheckpointError: there is no such checkpoint.
    """
    from smolcluster.run.folder import default_out

    point = None
    if resume is not None:
        from smolcluster.run.resume import LATEST, check_same_run, find_resume_point, out_of, schedule_note

        wanted = {}
        if resume == LATEST and out is None:
            first = chosen.resolve()
            given = {"algorithm": first.config.algorithm, "model.type": first.config.model.type}
            wanted = {key: value for key, value in given.items() if first.sources[key] != "default"}
        try:
            point = find_resume_point(resume, out, wanted)
        except CheckpointError:
            if leads:
                raise
    if point is None:
        resolved = chosen.resolve()
        folder = out or default_out(resolved.config)
    else:
        resolved = chosen.resolve((point.meta.config, f"checkpoint {point.checkpoint}"))
        check_same_run(point, resolved.config)
        folder = out_of(point, out)
        for note in (*point.notes, schedule_note(point, resolved.config)):
            if note is not None:
                chosen.say(f"warning: {note}")
        chosen.say(f"going on from {point.checkpoint} ({point.step} steps)")
    for warning in resolved.warnings:
        if warning not in resolved.readings:  # `config check` and `config show` say how a file is read
            chosen.say(f"warning: {warning}")
    return resolved.config, point, folder


def say_stages(chosen: Choices, config: Config, world_size: int) -> None:
    """With fsdp, say what a rank needs in each stage."""
    from smolcluster.config.memory import stages_note

    if (needs := stages_note(config, world_size)) is not None:
        chosen.say(needs)


def note_batch(point: ResumePoint | None, config: Config, world_size: int, quiet: bool) -> None:
    """Say that the files' batch size does not count in a run that goes on with another number of ranks."""
    if point is None or quiet:
        return
    from smolcluster.config.schema import resolved_batch_size
    from smolcluster.run.resume import batch_note

    note = batch_note(point, config, resolved_batch_size(config), world_size)
    if note is not None:
        print(f"warning: {note}", file=sys.stderr)


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


def conclude(ran: Ran, config: Config, quiet: bool) -> NoReturn:
    """Print what a run gave, and end the command with its exit code."""
    if ran.error is not None:
        print(f"error: {ran.error}", file=sys.stderr)
        _point_at_checkpoint(ran)
    if ran.summary is not None and ran.error is None and not quiet:
        for line in result_lines(ran.summary, config):
            print(line)
        if ran.exit_code != 0:
            print("stopped before the last step, as asked")
            _point_at_checkpoint(ran)
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
    """What is left of a run that did not come to its end: saving may have been cut off too."""
    if ran.out is None:
        return
    latest = ran.out / "checkpoints" / "latest"
    if latest.is_file():
        print(f"the newest checkpoint is {latest.parent / latest.read_text().strip()}", file=sys.stderr)
