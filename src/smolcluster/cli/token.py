"""`smolcluster token new`: the secret that the machines of one cluster share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolcluster.errors import ConfigError

app = typer.Typer(name="token", help="Make the secret that the machines of one cluster share.", no_args_is_help=True)


@app.callback()
def token() -> None:
    """Make the secret that the machines of one cluster share."""


@app.command()
def new(
    file: Annotated[Path | None, typer.Option(help="Write it here instead of the user's config folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a token that is there.")] = False,
) -> None:
    """Write a fresh token to a file that only you can read. Copy that file to the other machines."""
    from smolcluster.transport.security import new_token, save_token, token_path

    path = file or token_path()
    if path.exists() and not force:
        raise ConfigError(
            f"there is a token in {path} already, which other machines may know. Keep it, or replace it with --force"
        )
    try:
        save_token(new_token(), path)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written ({exc.strerror or exc}). Choose another --file") from exc
    typer.echo(f"new token in {path} (mode 0600). Copy it to the same place on every machine, for instance with scp")
