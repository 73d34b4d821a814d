"""`smolcluster serve` and `smolcluster generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from smolcluster.cli.train import (
    ClusterFile,
    ConfigFiles,
    Local,
    Overrides,
    Preset,
    Quiet,
    TokenFile,
    say_to_stderr,
)
from smolcluster.errors import ConfigError

if TYPE_CHECKING:
    from smolcluster.run.served_model import Choice

Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER_OR_HF_ID",
        help="A Hugging Face folder, such as an export, or an id; or a key of a model file, such as causal_gpt2.",
    ),
]
DType: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help="auto, fp64, fp32, bf16, fp16, int8 or int8-dynamic.")
]
Device: TypeAlias = Annotated[str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda or mps.")]


def serve(
    model: Model = None,
    local: Local = None,
    cluster: ClusterFile = None,
    hostname: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --cluster: this machine's name there. Default: the controller."),
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="mp|dp", help="mp: divide the layers; dp: replicas of all of them.")
    ] = "mp",
    split: Annotated[str | None, typer.Option(metavar="6,5,1", help="Blocks of each stage.")] = None,
    dtype: DType = "fp32",
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="The port to listen at; 0: any. Default: the cluster file's, or 8080.", min=0, max=65535),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the key that clients have to send.")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests that are answered at once.", min=1)] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait.", min=0)] = None,
    preset: Preset = None,
    config: ConfigFiles = None,
    override: Overrides = None,
    device: Device = "cpu",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Answers do not depend on each other, to the last bit; slower.")
    ] = False,
    token_file: TokenFile = None,
    quiet: Quiet = False,
) -> None:
    """Serve a language model over HTTP: OpenAI's API, server-sent events and WebSocket.

    Over several machines: start it on each with the same --cluster FILE; but for the controller with --hostname NAME.
    """
    _check_places(local, cluster, hostname)
    say = say_to_stderr(quiet)
    flags = {"serving.max_concurrent": max_concurrent, "serving.max_queue": max_queue}
    choice = _choose(model, say, preset, config, override, cluster, flags)
    resolved, settings = choice.config, choice.config.serving
    blocks, kind = _blocks(split), _mode(mode)
    from smolcluster.run.serve_machines import find_part, processes_of, told_split
    from smolcluster.run.served_model import find_model, note_stages
    from smolcluster.run.stage import StagePlace, serve_layers
    from smolcluster.run.stages import Layout

    part = None if cluster is None else find_part(resolved, hostname, token_file, say)
    if isinstance(part, StagePlace):
        serve_layers(part, str(find_model(choice, say).folder), device)
    patience = resolved.cluster.patience
    if part is None:
        layout = Layout(kind, local or 1, blocks, patience, deterministic)
    else:
        told = told_split(resolved, part.hosts, blocks)
        layout = Layout(kind, processes_of(resolved, part.hosts), told, patience, deterministic, machines=part)
    key = None if api_key_file is None else read_key(api_key_file)
    from smolcluster.run.serve import (
        listen_http,
        load_server_extra,
        make_server,
        make_service,
        run_server,
        sessions_file,
    )

    load_server_extra()
    from smolcluster.serving.metrics import ServingMetrics
    from smolcluster.serving.sessions import SessionStore

    served = find_model(choice, say)
    if local is None and part is None:
        note_stages(settings, say, " or --cluster FILE")
    metrics = ServingMetrics(served.id)
    web = resolved.cluster.web_interface
    listeners = [listen_http(host, port if port is not None else web.api_port)]
    if web.frontend_port is not None and cluster is not None:
        listeners.append(listen_http(host, web.frontend_port))
    with SessionStore(sessions_file(settings, served.id)) as store:
        service = make_service(
            str(served.folder), settings, dtype=dtype, device=device, layout=layout, observer=metrics, model=served.id
        )
        for listener in listeners:
            listener.listen()  # who connects from now on is answered
        address = f"http://{host}:{listeners[0].getsockname()[1]}"
        say(f"{service.model} is served at {address}; stop with Ctrl-C")
        try:
            run_server(make_server(service, host, key=key, metrics=metrics, store=store), listeners)
        finally:
            service.close()


def generate(
    prompt: Annotated[str, typer.Option(help="The text's beginning.")],
    model: Model = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to write.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.", min=0.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that reach this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.", min=0, max=2**63 - 1)] = None,
    local: Local = None,
    dtype: DType = "fp32",
    preset: Preset = None,
    config: ConfigFiles = None,
    override: Overrides = None,
    device: Device = "cpu",
) -> None:
    """Let a language model write on, without a server."""
    _check_places(local, None, None)
    say = say_to_stderr(quiet=False)
    choice = _choose(model, say, preset, config, override, None, {"serving.max_concurrent": 1})
    settings = choice.config.serving
    from smolcluster.run.serve import make_service, write_on
    from smolcluster.run.served_model import find_model, note_stages
    from smolcluster.run.stages import Layout
    from smolcluster.serving.service import Wishes

    layout = Layout(processes=local or 1)
    served = find_model(choice, say)
    if local is None:
        note_stages(settings, say)
    service = make_service(str(served.folder), settings, dtype=dtype, device=device, layout=layout, model=served.id)
    wishes = Wishes(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens)
    print(prompt, end="", flush=True)
    rate = write_on(service, prompt, wishes, lambda piece: print(piece, end="", flush=True))
    print()
    print(rate, file=sys.stderr)


def _choose(
    model: str | None,
    say: Callable[[str], None],
    preset: str | None,
    config: list[Path] | None,
    override: list[str] | None,
    cluster: Path | None,
    flags: dict[str, int | None],
) -> Choice:
    from smolcluster.run.served_model import choose_model

    return choose_model(
        model,
        say,
        preset=preset,
        files=config or (),
        cluster_files=() if cluster is None else (cluster,),
        overrides=override or (),
        flags=flags,
    )


def read_key(file: Path) -> str:
    """The key in a file, which holds nothing else."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"--api-key-file {file} cannot be read ({exc}). Name a file with the key in one line"
        ) from exc
    if not key or "\n" in key:
        raise ConfigError(f"--api-key-file {file} must have the key, and nothing else, in one line")
    return key


def _check_places(local: int | None, cluster: Path | None, hostname: str | None) -> None:
    if cluster is not None and local is not None:
        raise ConfigError("--local is for this machine alone, and --cluster for several: give one of them")
    if hostname is not None and cluster is None:
        raise ConfigError(f"--hostname {hostname} is a name in a cluster file: give --cluster FILE with it")
    if local is not None and local < 1:
        raise ConfigError(f"--local {local}: give the number of stages, 1 or more")


def _mode(mode: str) -> Literal["mp", "dp"]:
    if mode == "mp":
        return "mp"
    if mode == "dp":
        return "dp"
    raise ConfigError(f"--mode {mode}: choose mp, which divides the layers, or dp, which has replicas")


def _blocks(split: str | None) -> tuple[int, ...] | None:
    if split is None:
        return None
    try:
        return tuple(int(part) for part in split.split(","))
    except ValueError:
        raise ConfigError(f"--split {split}: give the blocks of each stage, such as 6,5,1") from None
