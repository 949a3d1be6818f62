"""The commands that read: status, versions, download, healthcheck here, and the others of the reader's side.

Data goes to stdout, logs and progress to stderr. What the commands do is elsewhere; here are options and exits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.evaluate import evaluate, recalibrate, validate
from ema_reader.cli.options import Json, Target, Token, Url, exits, named, parse_target
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (status, versions, download, evaluate, validate, recalibrate, healthcheck):
        app.command()(command)


def status(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="One run; all without it.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the runs: state, steps, rates, gaps."""
    with exits(), Reader(url, token) as reader:
        runs = reader.runs() if run is None else (reader.run(named("run", run)),)
        typer.echo(render.as_json({"runs": runs}) if json else render.status_text(runs))


def versions(
    target: Annotated[str, typer.Argument(metavar="RUN[/AVERAGE]", help="A run, or one of its averages.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the versions that can be downloaded, newest first."""
    with exits(), Reader(url, token) as reader:
        run, slash, average = target.partition("/")
        if not run or "/" in average or (slash and not average):
            raise UsageError(f"{target!r} is not RUN or RUN/AVERAGE, for example resnet34/ema-0.999")
        named("run", run)
        averages = [named("average", average)] if average else reader.run(run).average_names
        found = [version for name in averages for version in reader.versions(run, name)]
        typer.echo(render.as_json({"versions": found}) if json else render.versions_text(found))


def download(
    target: Target,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; default RUN-AVERAGE-step-N.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download a version, verified; goes on where an earlier download stopped. Prints the folder."""
    with exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        folder = output or Path(f"{version.run}-{version.average}-step-{version.step}")
        path = reader.download(version, folder)
        typer.echo(render.as_json({"path": str(path), "version": version}) if json else str(path))


def healthcheck(url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Exit 0 when the server is ready, 1 when it is not or does not answer. Needs no token."""
    with exits(code=1), Reader(url) as reader:
        ready, checks = reader.ready()
        typer.echo(render.as_json({"ready": ready, "checks": checks}) if json else render.health_text(ready, checks))
        raise typer.Exit(0 if ready else 1)
