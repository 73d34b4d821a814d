"""The command line. `smolcluster --help` lists the commands; torch is imported only inside those that need it."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from smolcluster.cli import bench, chat, config, demo, export, plan, serve, token, train
from smolcluster.errors import ConfigError, SmolError

EXIT_INTERRUPTED = 130
# Typer brings its own copy of click in newer releases and uses the installed one in older: ask it, not click.
_UsageProblem = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="smolcluster",
    help="Train and serve neural networks on the machines you already own, over plain TCP sockets.",
    add_completion=False,
    pretty_exceptions_enable=False,  # errors are ours to print, on one or two lines
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("node")(train.node)
app.command("demo")(demo.demo)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("generate")(serve.generate)
app.command("chat")(chat.chat)
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
app.add_typer(plan.app, name="plan")
app.add_typer(token.app, name="token")


@app.command()
def version() -> None:
    """Print the versions of smolcluster, Python and torch."""
    from platform import platform, python_version

    typer.echo(f"smolcluster {_installed('smolcluster')}")
    typer.echo(f"python {python_version()}, torch {_installed('torch')}, {platform()}")


def main(argv: Sequence[str] | None = None, prog_name: str = "smolcluster") -> NoReturn:
    """Run one command and end the process with its exit code.

    Args:
        argv: the arguments; None: those of this process.
        prog_name: how the command is called in help texts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _leave(_run(arguments or ["--help"], prog_name))


def _run(arguments: list[str], prog_name: str) -> int:
    try:
        code = app(arguments, prog_name=prog_name, standalone_mode=False)
    except SmolError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except typer.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `smolcluster config show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the program's top: a traceback is not for the user's screen
        if isinstance(error, _UsageProblem):
            return _explain_usage(error, prog_name)
        return _complain(_unexpected(error), 3)
    return code if isinstance(code, int) else 0


def _explain_usage(error: Exception, prog_name: str) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(error), err=True)
        return ConfigError.exit_code
    context = getattr(error, "ctx", None)
    command = prog_name if context is None else context.command_path
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    stop = "" if message.endswith((".", ")", "?")) else "."
    return _complain(f"{message}{stop} See {command} --help", ConfigError.exit_code)


def _unexpected(error: Exception) -> str:
    path = Path(tempfile.gettempdir(), f"smolcluster-error-{os.getpid()}.txt")
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        where = f"The traceback is in {path}"
    except OSError:
        where = "There is no traceback, as the temporary folder cannot be written"
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}. This is a defect of smolcluster. {where}"


def _complain(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


def _leave(exit_code: int) -> NoReturn:
    if exit_code == 0:
        sys.exit(0)
    # After a failure or Ctrl-C nothing may keep the process: destructors of torch.distributed wait for lost ranks.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
