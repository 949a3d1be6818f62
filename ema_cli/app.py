"""Collects the commands of `ema` into one typer application.

A command whose packages are missing stays in the list and says which extra it needs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ema_cli.exits import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, missing_advice
from ema_proto.variables import misspelt

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or the copy that newer releases of typer have

# Modules with `register(app)`, and the commands that it adds.
COMMANDS_OF: Mapping[str, tuple[str, ...]] = {
    "ema_server.cli": ("serve",),
    "ema_reader.cli.commands": (
        *("status", "versions", "metrics", "best", "download", "push", "watch"),
        *("evaluate", "validate", "recalibrate"),
        *("averages", "ledger", "synthesize", "blend", "delete", "healthcheck"),
    ),
    "ema_server.checkpoints.command": ("average",),
    "ema_cli.doctor": ("doctor",),
    "ema_cli.demo.command": ("demo",),
}
COMMANDS = tuple(command for commands in COMMANDS_OF.values() for command in commands)


def build() -> typer.Typer:
    """The application with every command, in the order of `COMMANDS`."""
    app = typer.Typer(
        name="ema",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # rich cuts long names of options and variables
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for module, commands in COMMANDS_OF.items():
        try:
            importlib.import_module(module).register(app)
        except ModuleNotFoundError as error:
            advice = {command: text for command in commands if (text := missing_advice(error, command))}
            if not advice:
                raise
            for command, text in advice.items():
                _register_missing(app, command, text)
    for info in app.registered_commands:  # the list of commands shows whole sentences, which click would cut
        whole = info.help or inspect.getdoc(info.callback) or ""
        info.short_help = whole.partition("\n\n")[0]
    return app


def run(app: typer.Typer) -> int:
    """Run the command line and return the exit code; a usage error is one line on stderr."""
    for warning in misspelt(os.environ, variables(app)):
        typer.echo(f"ema: {warning}", err=True)
    try:
        code = app(prog_name="ema", standalone_mode=False)
    except _UsageError as error:
        typer.echo(_one_line(error), err=True)
        return EXIT_USAGE
    except typer.Abort:
        return EXIT_INTERRUPTED
    except OSError as error:  # not handled by the command: stdout on a full disk, a deleted working directory
        place = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"ema: {place}{error.strerror or error}", err=True)
        return EXIT_FAILURE
    return code if isinstance(code, int) else 0


def variables(app: typer.Typer) -> set[str]:
    """The environment variables of all options."""
    group: Any = typer.main.get_command(app)
    return {option.envvar for command in group.commands.values() for option in command.params if option.envvar}


def _one_line(error: Any) -> str:
    """A usage error in one line that ends with the command's --help; without arguments, the help itself."""
    text: str = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return text
    if error.ctx is None:  # click does not name the command when an option lacks its value
        given = sys.argv[1:2]
        command = f"ema {given[0]}" if given and given[0] in COMMANDS else "ema"
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
    """Averaged model weights, computed and served by a process beside the trainer."""


def _register_missing(app: typer.Typer, command: str, advice: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(command, help=f"({advice})", context_settings=settings)(_refuse(advice))


def _refuse(advice: str) -> Callable[[], None]:
    def refuse() -> None:
        typer.echo(f"ema: {advice}", err=True)
        raise typer.Exit(EXIT_USAGE)

    return refuse
