"""The commands of `ema`, collected from the rooms. Comes in: nothing; goes out: a typer application.

A room whose packages are missing keeps its commands in the list; each of them says which extra it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

import typer

from ema_cli.main import EXIT_USAGE, missing_advice


@dataclass(frozen=True, slots=True)
class Room:
    """A module with `register(app)`, and the commands that this adds."""

    module: str
    commands: tuple[str, ...]


ROOMS = (
    Room("ema_server.cli", ("serve",)),
    Room("ema_reader.cli", ("status", "versions", "download", "evaluate", "healthcheck")),
    Room("ema_cli.doctor", ("doctor",)),
    Room("ema_cli.demo.command", ("demo",)),
)


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
