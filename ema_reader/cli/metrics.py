"""The commands `metrics` and `best`: what versions scored, and which one is best."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Long, RunName, Token, Url, exits
from ema_reader.cli.tables import table, wrapped
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.scores import Direction, Score, chosen_metric, direction_of, metric_names, ranked, scores_of
from ema_reader.targets import named

By = Annotated[str | None, typer.Option("--by", metavar="METRIC", help="The metric to sort and choose by.")]
Lower = Annotated[
    bool | None,
    typer.Option("--min/--max", help="Which value is best; default: by the metric's name.", show_default=False),
]

Ranking = Mapping[str, tuple[Direction, tuple[Score, ...]]]


def metrics(
    run: RunName,
    by: By = None,
    lower: Lower = None,
    long: Long = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on stdout.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the metrics of every version: one column for each metric, its best value marked with *.

    With --by, only versions that have this metric are shown, best first, and --min or --max says which of its values is
    best. Without --by, --min or --max applies to every metric.
    """
    with exits(), Reader(url, token) as reader:
        if json and as_csv:
            raise UsageError("--json and --csv are two formats: choose one")
        scores = scores_of(reader.metrics(named("run", run)))
        names = metric_names(scores)
        ranking = ranking_of(scores, by, lower)
        if by is not None:
            scores = ranking[chosen_metric(run, scores, by)][1]
        if json:
            typer.echo(render.as_json({"metrics": scores, "best": best_json(ranking)}))
        elif as_csv:
            typer.echo(_csv(scores, names), nl=False)
        else:
            typer.echo(scores_text(scores, ranking, by, long=long) if scores else "no metrics yet")


def best(
    run: RunName,
    by: By = None,
    lower: Lower = None,
    folder: Annotated[
        Path | None, typer.Option("--download", metavar="DIR", help="Download the version into this folder.")
    ] = None,
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Print the best version that is still stored, and download it with --download."""
    with exits(), Reader(url, token) as reader:
        found = reader.best(named("run", run), by, lower=lower)
        version = found.version
        if found.better_deleted:
            typer.echo(f"ema: warning: better versions that are no longer stored: {found.better_deleted}", err=True)
        path = None if folder is None else reader.download(version, folder)
        if json:
            shown = {"version": version, "metric": found.metric, "value": found.value, "direction": found.direction}
            typer.echo(render.as_json({**shown, "path": None if path is None else str(path)}))
            return
        columns = ("average", "step", "id", found.metric)
        row = (version.average, version.step, render.shown_id(version.id, long=long), f"{found.value:.6g}")
        typer.echo(table(columns, [row]))
        typer.echo(f"{found.metric}: {found.direction}" if path is None else render.folder_text(path))


def ranking_of(scores: Sequence[Score], by: str | None, lower: bool | None) -> Ranking:
    """For each metric whether lower is better, and the scores, best first; `lower` applies to `by`, None: to all."""
    names = metric_names(scores)
    directions = {name: direction_of(name, lower if by in (None, name) else None) for name in names}
    return {name: (directions[name], ranked(scores, name, directions[name])) for name in names}


def scores_text(
    scores: Sequence[Score],
    ranking: Ranking,
    by: str | None,
    *,
    long: bool,
    others: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """A table with a line for each version and a column for each metric, then what the marks and gaps mean.

    `by` is the metric that is shown first of all where not all fit. `others` has further columns: by name, the text of
    each version.
    """
    others = others or {}
    marked = {(name, first.version) for name, (_, order) in ranking.items() for first in order[:1]}
    rows = []
    for score in scores:
        values = [_value(score, name, is_best=(name, score.version) in marked) for name in ranking]
        texts = [column.get(score.version) for column in others.values()]
        rows.append((score.step, score.average, render.shown_id(score.version, long=long), *texts, *values))
    notes = [f"* best {name}: {direction}" for name, (direction, order) in ranking.items() if order]
    columns = ("step", "average", "version", *others, *ranking)
    optional = (*([by] if by is not None else []), *ranking, *others, "version")
    lines = table(columns, rows, optional=optional, long=long)
    return "\n".join([lines, *wrapped([*notes, *render.metric_notes(scores)])])


def _value(score: Score, name: str, *, is_best: bool) -> str:
    if name in score.missing:
        return render.missing_text(score.missing[name])
    if name not in score.metrics:
        return "-"
    return f"{score.metrics[name]:.6g}{'*' if is_best else ''}"


def best_json(ranking: Ranking) -> dict[str, object]:
    """The best version by each metric that has a finite value."""
    return {
        name: {
            "version": order[0].version,
            "average": order[0].average,
            "step": order[0].step,
            "value": order[0].metrics[name],
            "direction": direction,
        }
        for name, (direction, order) in ranking.items()
        if order
    }


def _csv(scores: Sequence[Score], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "average", "version", *names))
    for score in scores:
        values: dict[str, float | str] = {name: render.missing_text(why) for name, why in score.missing.items()}
        values |= score.metrics
        writer.writerow((score.step, score.average, score.version, *(values.get(name, "") for name in names)))
    return text.getvalue()
