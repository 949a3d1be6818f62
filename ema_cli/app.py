"""The commands of `ema`, collected from the rooms. Comes in: nothing; goes out: a typer application.

A room whose packages are missing keeps its commands in the list; each of them says which extra it needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ema_cli.main import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, missing_advice
from ema_proto.variables import misspelt

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or the copy that newer releases of typer have


@dataclass(frozen=True, slots=True)
class Room:
    """A module with `register(app)`, and the commands that this adds."""

    module: str
    commands: tuple[str, ...]


ROOMS = (
    Room("ema_server.cli", ("serve",)),
    Room(
        "ema_reader.cli.commands",
        ("status", "versions", "download", "evaluate", "validate", "recalibrate", "healthcheck"),
    ),
    Room("ema_reader.cli.derived", ("synthesize",)),
    Room("ema_reader.cli.averages", ("averages", "ledger")),
    Room("ema_cli.doctor", ("doctor",)),
    Room("ema_cli.demo.command", ("demo",)),
)

COMMANDS = frozenset(command for room in ROOMS for command in room.commands)


def build(rooms: tuple[Room, ...] = ROOMS) -> typer.Typer:
    """Compose the application; rooms come in the order of the flow, which is the order of `ema --help`."""
    app = typer.Typer(name="ema", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    for room in rooms:
        try:
            importlib.import_module(room.module).register(app)
        except ModuleNotFoundError as error:
            advice = missing_advice(error)
            if advice is None:
                raise
            for command in room.commands:
                _register_missing(app, command, advice)
    return app


def run(app: typer.Typer) -> int:
    """Carry out the command line and return the exit code; what is wrong with it is one line on stderr."""
    for warning in misspelt(os.environ, variables(app)):
        typer.echo(f"ema: {warning}", err=True)
    try:
        code = app(prog_name="ema", standalone_mode=False)
    except _UsageError as error:
        typer.echo(_one_line(error), err=True)
        return EXIT_USAGE
    except typer.Abort:
        return EXIT_INTERRUPTED
    except OSError as error:  # what a command did not answer itself: a full disk under stdout, a folder that is gone
        typer.echo(f"ema: {error}", err=True)
        return EXIT_FAILURE
    return code if isinstance(code, int) else 0


def variables(app: typer.Typer) -> set[str]:
    """The variables that the options of all commands can be given by."""
    group: Any = typer.main.get_command(app)
    return {option.envvar for command in group.commands.values() for option in command.params if option.envvar}


def _one_line(error: Any) -> str:
    """A usage error in one line with the way on; the help itself where nothing was asked."""
    text: str = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return text
    if error.ctx is None:  # an option without its value: click does not say of which command
        named = sys.argv[1:2]
        command = f"ema {named[0]}" if named and named[0] in COMMANDS else "ema"
    else:
        command = error.ctx.command_path
    return f"{command}: {' '.join(text.split()).rstrip('.')}; see {command} --help"


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("ema-sidecar"))
        raise typer.Exit


def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Averaged model weights, kept and served by a process beside the trainer."""


def _register_missing(app: typer.Typer, command: str, advice: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(command, help=f"({advice})", context_settings=settings)(_refuse(advice))


def _refuse(advice: str) -> Callable[[], None]:
    def refuse() -> None:
        typer.echo(f"ema: {advice}", err=True)
        raise typer.Exit(EXIT_USAGE)

    return refuse
