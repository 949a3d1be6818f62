"""Commands about averages: `averages` shows and changes those of a run, `ledger` lists what is inside a version."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Target, Token, Url, check_rule, exits, named, parse_target
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (averages, ledger):
        app.command()(command)


def averages(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run.")],
    add: Annotated[str | None, typer.Option("--add", metavar="SPEC", help="Add one, for example ema:0.9995.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="With --add: its name; default made of the rule.")] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="AVERAGE", help="Remove the one of this name.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the averages of a run: rule, decay and half-life now, mean age, what is left of the beginning.

    With --add or --remove, one at a time, it changes them first, while the run's trainer streams.
    """
    with exits(), Reader(url, token) as reader:
        if name is not None and add is None:
            raise UsageError("--name belongs to --add: say which rule, for example --add ema:0.9995")
        if add is not None and remove is not None:
            raise UsageError("--add and --remove are two changes, and either may fail: ask for one after the other")
        named("run", run)
        if add is not None:
            check_rule(add, name or "")
            reader.averages.add(run, add, name or "")
        if remove is not None:
            reader.averages.remove(run, named("average", remove))
        found = reader.averages.of(run)
        typer.echo(render.as_json({"averages": found}) if json else render.averages_text(found))


def ledger(
    target: Target,
    tail: Annotated[int | None, typer.Option("--tail", min=1, help="The newest so many steps; default all.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the steps inside a version with their shares in it, newest first: enough to rebuild it from snapshots."""
    with exits(), Reader(url, token) as reader:
        run, average, rev = parse_target(target)
        found = reader.averages.ledger(run, average, rev, tail)
        typer.echo(render.as_json(found) if json else render.ledger_text(found))
