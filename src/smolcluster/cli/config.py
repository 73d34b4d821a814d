"""`smolcluster config show | check | list`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolcluster.config.dump import config_yaml
from smolcluster.config.load import check_file, load_config, preset_names, preset_text

app = typer.Typer(name="config", help="Show, check and list configurations.", no_args_is_help=True)


@app.command()
def show(
    preset: Annotated[str | None, typer.Option(help="Start from this preset.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file; later ones win.")] = None,
    cluster: Annotated[list[Path] | None, typer.Option(help="Cluster file, flat or with sections.")] = None,
    override: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Set one key.")] = None,
) -> None:
    """Print the resolved configuration; a comment behind each value says where it comes from."""
    resolved = load_config(preset, config or (), cluster or (), override or ())
    for warning in resolved.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(config_yaml(resolved.config, resolved.sources), nl=False)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML files, each judged on its own.")],
) -> None:
    """Say `FILE: ok`, or what is wrong with file, line and key. Exit code 2 if anything is wrong."""
    failed = False
    for file in files:
        report = check_file(file)
        for warning in report.warnings:
            typer.echo(f"warning: {warning}")
        for error in report.errors:
            typer.echo(f"error: {error}", err=True)
        if report.errors:
            failed = True
        else:
            typer.echo(f"{file}: ok")
    if failed:
        raise typer.Exit(2)


@app.command("list")
def list_presets() -> None:
    """Name the presets, one line each."""
    names = preset_names()
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:<{width}}  {_description(name)}")


def _description(name: str) -> str:
    """The preset's first line, a comment."""
    return preset_text(name).split("\n", 1)[0].removeprefix("#").strip()
