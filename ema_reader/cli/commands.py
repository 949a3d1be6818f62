"""Registers every command of the reader; `status`, `versions`, `download`, `delete` and `healthcheck` are here.

Data goes to stdout, logs and progress to stderr.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ema_reader.cli import render
from ema_reader.cli.averages import averages, ledger
from ema_reader.cli.blend import blend
from ema_reader.cli.evaluate import evaluate, recalibrate, validate
from ema_reader.cli.metrics import best, metrics
from ema_reader.cli.options import Json, Long, RunName, Target, Token, Url, exits
from ema_reader.cli.push import push
from ema_reader.cli.synthesize import synthesize
from ema_reader.cli.watch import watch
from ema_reader.errors import NotFound, ReaderError, RunUnreadable, UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.scores import Score, scores_of
from ema_reader.targets import named, parse_target
from ema_reader.values import Run


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    commands: tuple[Callable[..., None], ...] = (
        *(status, versions, metrics, best, download, push, watch),
        *(evaluate, validate, recalibrate),
        *(averages, ledger, synthesize, blend, delete, healthcheck),
    )
    for command in commands:
        app.command()(command)


def status(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Show only this run, with its metrics.")] = None,
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the runs: state, steps, rates, gaps. With RUN also the newest metrics of each average.

    The state of a run is active (its trainer streams), no-trainer (it is not finished and no trainer is connected; a
    trainer can continue it), lost (its trainer went silent) or finished. JSON says waiting for no-trainer.
    """
    with exits(), Reader(url, token) as reader:
        if run is None:
            runs = reader.runs()
            typer.echo(render.as_json({"runs": runs}) if json else render.status_text(runs, long=long))
            return
        found = reader.run(named("run", run))
        newest = {score.average: score for score in _scores(reader, run)}  # by step: the last one stays
        if json:
            typer.echo(render.as_json({"runs": [_with_metrics(found, newest)]}))
        else:
            lines = (
                render.status_text([found], long=long),
                render.publishing_text(found),
                render.lane_text(found),
                render.ranks_text(found),
            )
            shown = "\n".join(filter(None, lines))
            typer.echo(f"{shown}\n\n{render.newest_metrics_text(found, newest, long=long)}")


def versions(
    target: Annotated[str, typer.Argument(metavar="RUN[/AVERAGE]", help="A run, or one of its averages.")],
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the versions that can be downloaded with their metrics, newest first."""
    with exits(), Reader(url, token) as reader:
        run, slash, average = target.partition("/")
        if not run or "/" in average or (slash and not average):
            raise UsageError(f"{target!r} is not RUN or RUN/AVERAGE, for example resnet34/ema-0.999")
        named("run", run)
        names = [named("average", average)] if average else reader.run(run).average_names
        found = [version for name in names for version in reader.versions(run, name)]
        scores = {score.version: score for score in _scores(reader, run)} if found else {}
        if json:
            shown = [{**dataclasses.asdict(v), **_metrics_json(scores.get(v.id))} for v in found]
            typer.echo(render.as_json({"versions": shown}))
        else:
            typer.echo(render.versions_text(found, scores, long=long))


def download(
    target: Target,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; default: RUN-AVERAGE-step-N.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download a version, verified; an interrupted download is resumed. Prints the folder."""
    with exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        folder = output or Path(f"{version.run}-{version.average}-step-{version.step}")
        path = reader.download(version, folder)
        typer.echo(render.as_json({"path": str(path), "version": version}) if json else render.folder_text(path))


def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Delete a run that no trainer streams: its versions, and everything else that the server has of it.

    Says what it will delete and asks first.
    """
    with exits(), Reader(url, token) as reader:
        shown, sentence = _doomed(reader, named("run", run))
        typer.echo(f"{run} {sentence}", err=True)
        if not yes and not sys.stdin.isatty():
            raise UsageError("nothing is deleted: no terminal to ask at; give --yes to delete without a question")
        if not yes and not typer.confirm("Delete it for good?", err=True):
            raise ReaderError("nothing is deleted")
        reader.delete(run)
        typer.echo(render.as_json(shown) if json else f"{run} is deleted")


def _doomed(reader: Reader, run: str) -> tuple[dict[str, Any], str]:
    """What deleting a run deletes, as JSON and as a sentence."""
    try:
        found = reader.run(run)
    except RunUnreadable:
        return {"deleted": run, "versions": 0, "disk_bytes": None}, f"at {reader.url}: files that cannot be read"
    count = len({version.id for name in found.average_names for version in reader.versions(run, name)})
    size = "of unknown size" if found.disk_bytes is None else f"{render.size_text(found.disk_bytes)} on its disk"
    shown = {"deleted": run, "versions": count, "disk_bytes": found.disk_bytes}
    return shown, f"({found.state}) at {reader.url}: {count} versions, ring and metrics, {size}"


def healthcheck(url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Exit with 0 when the server is ready, 1 when it is not or does not answer. Needs no token."""
    with exits(code=1), Reader(url, token="") as reader:
        ready, checks = reader.ready()
        typer.echo(render.as_json({"ready": ready, "checks": checks}) if json else render.health_text(ready, checks))
        raise typer.Exit(0 if ready else 1)


def _scores(reader: Reader, run: str) -> tuple[Score, ...]:
    """The metrics of a run; where the server cannot read them, a warning."""
    try:
        return scores_of(reader.metrics(run))
    except NotFound:
        raise
    except ReaderError as error:
        typer.echo(f"ema: warning: no metrics are shown: {error}", err=True)
        return ()


def _with_metrics(run: Run, newest: dict[str, Score]) -> dict[str, Any]:
    shown = dataclasses.asdict(run)
    for average in shown["averages"]:
        score = newest.get(average["name"])
        average.update(_metrics_json(score))
        average["metrics_step"] = None if score is None else score.step
    return shown


def _metrics_json(score: Score | None) -> dict[str, dict[str, Any]]:
    return {"metrics": {} if score is None else score.metrics, "missing": {} if score is None else score.missing}
