"""`ema doctor`: is this machine fit to train, serve or read on? Comes in: options; goes out: a line for each check."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from ema_cli import checks
from ema_cli.checks import Check, State


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(doctor)


def doctor(
    zmq: Annotated[str, typer.Option("--zmq", envvar="EMA_ZMQ", help="Address for trainers.")] = "tcp://127.0.0.1:5555",
    http: Annotated[str, typer.Option("--http", envvar="EMA_HTTP", help="Address for readers.")] = "127.0.0.1:8080",
    data: Annotated[Path, typer.Option("--data", envvar="EMA_DATA", help="The server's data folder.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Look at versions, addresses, disk, memory and GPU; exit code 1 when something keeps a server from working."""
    found = examine(zmq, http, data)
    healthy = all(check.state is not State.PROBLEM for check in found)
    if json:
        typer.echo(jsonlib.dumps({"ok": healthy, "checks": [dataclasses.asdict(check) for check in found]}))
    else:
        for check in found:
            typer.echo(line(check))
    raise typer.Exit(0 if healthy else 1)


def examine(zmq: str, http: str, data: Path) -> tuple[Check, ...]:
    """All checks, in the order in which they are shown."""
    running = checks.answers(http)
    return (
        *checks.versions(),
        checks.zeromq(),
        checks.zmq_address(zmq, running),
        checks.http_address(http, running),
        *checks.disk(data),
        *checks.machine(),
        checks.gpu(),
    )


def line(check: Check) -> str:
    """One check as a line for people."""
    advice = f" - {check.advice}" if check.advice else ""
    return f"{check.state.value:7}  {check.name}: {check.found}{advice}"
