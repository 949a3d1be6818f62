"""Commands about averages: `averages` shows and changes them, `ledger` lists the steps inside a version."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Long, RunName, Target, Token, Url, check_rule, exits
from ema_reader.cli.tables import terminal_width
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import named, parse_target

_LEDGER_LINES = 20  # on a terminal; a version may hold thousands of steps


def averages(
    run: RunName,
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="SPEC", help="Add an average, for example ema:0.9995.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the added average; default: by its rule.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="AVERAGE", help="Remove this average.")
    ] = None,
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the averages of a run: rule, decay and half-life now, mean age, share of the initial weights.

    With --add or --remove, one at a time, the averages are changed first, while the run's trainer streams.
    """
    with exits(), Reader(url, token) as reader:
        specs, names = add or [], remove or []
        if name is not None and not specs:
            raise UsageError("--name belongs to --add: give a rule, for example --add ema:0.9995")
        if len(specs) + len(names) > 1:
            raise UsageError("more than one --add or --remove: each may fail, so use one at a time")
        named("run", run)
        for spec in specs:
            check_rule(spec, name or "")
            reader.averages.add(run, spec, name or "")
        for old in names:
            reader.averages.remove(run, named("average", old))
        found = reader.averages.of(run)
        typer.echo(render.as_json({"averages": found}) if json else render.averages_text(found, long=long))


def ledger(
    target: Target,
    tail: Annotated[
        int | None,
        typer.Option("--tail", min=1, help="Show only this many newest steps. On a terminal, the default is 20."),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the steps inside a version with their shares, newest first: enough to recompute it from snapshots."""
    with exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        found = reader.averages.ledger(version.run, version.average, version.id, tail)
        limit = _LEDGER_LINES if tail is None and terminal_width() is not None else None
        typer.echo(render.as_json(found) if json else render.ledger_text(found, limit))
