"""The command `synthesize`: power averages of other widths, and with --evaluate which of them is best."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.evaluate import evaluator_of
from ema_reader.cli.metrics import By, Lower, Ranking, best_json, ranking_of, scores_text
from ema_reader.cli.options import Json, Long, Token, Url, check_label, check_rule, exits, log_to_stderr
from ema_reader.derived import Synthesized
from ema_reader.errors import RequestRefused, UsageError
from ema_reader.evaluation.user_function import Evaluate, check_device
from ema_reader.evaluation.worker import measure
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.scores import Score, chosen_metric, scores_of
from ema_reader.targets import named
from ema_reader.values import Version

log = logging.getLogger(__name__)


def synthesize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run with at least two power averages.")],
    sigma_rel: Annotated[
        list[str] | None, typer.Option("--sigma-rel", help="Widths, for example 0.12 or 0.03,0.05; repeatable.")
    ] = None,
    gamma: Annotated[
        list[str] | None, typer.Option("--gamma", help="Exponents, instead of widths; repeatable.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="The step; default: the newest.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the average; default: power-SIGMA_REL.")] = None,
    function: Annotated[
        str | None, typer.Option("--evaluate", metavar="MODULE:FUNCTION", help="Evaluate each, and name the best.")
    ] = None,
    task: Annotated[str, typer.Option("--task", help="Name under which the metrics are reported.")] = "default",
    device: Annotated[str, typer.Option("--device", help="Where weights are loaded: cpu, cuda:0, ...")] = "cpu",
    recalibrate_bn: Annotated[
        str | None,
        typer.Option("--recalibrate-bn", metavar="MODULE:LOADER", help="Recompute BatchNorm statistics first."),
    ] = None,
    by: By = None,
    lower: Lower = None,
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Make power averages that the run did not keep from those that it kept.

    Prints a line for each: the version, and the estimated error in its steps' weights. With --evaluate, a table with a
    column for each metric, and the best version by each. Warnings go to stderr. Exit code 1 when one could not be made
    or evaluated.
    """
    with exits(), Reader(url, token) as reader:
        asked = _asked(named("run", run), sigma_rel or (), gamma or (), name)
        if function is None:
            if recalibrate_bn is not None or by is not None or lower is not None:
                raise UsageError("--recalibrate-bn, --by, --min and --max belong to --evaluate: give a function")
            made = _make(reader, run, asked, step, name)
            typer.echo("\n".join(render.as_json(each) if json else _line(each) for each in made))
            raise typer.Exit(0 if len(made) == len(asked) else 1)
        log_to_stderr()
        evaluator = evaluator_of(function, recalibrate_bn)
        check_device(device)
        check_label("--task", task)
        made = _make(reader, run, asked, step, name)
        traced: set[type[Exception]] = set()
        for each in made:
            _evaluate(reader, each.version, evaluator, task, device, traced)
        scores = _scores(reader, run, made, task)
        failed = len(made) < len(asked) or any(score.errors for score in scores)
        ranking = ranking_of(scores, by, lower)
        if by is not None:
            scores = ranking[chosen_metric(run, scores, by)][1]
        if json:
            typer.echo(render.as_json({"synthesized": made, "metrics": scores, "best": best_json(ranking)}))
        else:
            typer.echo(_text(run, made, scores, ranking, by, long=long))
        raise typer.Exit(int(failed))


def _asked(run: str, sigma_rel: Sequence[str], gamma: Sequence[str], name: str | None) -> tuple[tuple[str, float], ...]:
    """What to make: `sigma_rel` or `gamma`, and its value.

    Raises:
        UsageError: nothing, both, or a value that is no number or out of range; or a name for several averages.
    """
    if sigma_rel and gamma:
        raise UsageError("--sigma-rel and --gamma say the same in two ways: give one of them")
    option, texts = ("sigma_rel", sigma_rel) if sigma_rel else ("gamma", gamma)
    asked = tuple(dict.fromkeys((option, _number(option, part)) for text in texts for part in text.split(",")))
    if not asked:
        raise UsageError(f"give the widths to make, for example: ema synthesize {run} --sigma-rel 0.12")
    if name is not None and len(asked) > 1:
        raise UsageError("--name names one average: give one --sigma-rel or --gamma with it")
    return asked


def _number(option: str, text: str) -> float:
    check_rule(f"power:{option}={text.strip()}", "")
    return float(text)


def _make(
    reader: Reader, run: str, asked: Sequence[tuple[str, float]], step: int | None, name: str | None
) -> list[Synthesized]:
    """Make what can be made; the rest is a warning.

    Raises:
        RequestRefused: nothing can be made.
    """
    made, refused = [], []
    for option, value in asked:
        width, exponent = (value, None) if option == "sigma_rel" else (None, value)
        try:
            each = reader.derived.synthesize(run, sigma_rel=width, gamma=exponent, step=step, name=name)
        except RequestRefused as refusal:
            refused.append((f"{option} {value:g} was not made", refusal))
            continue
        made.append(each)
        if each.warning is not None:
            typer.echo(f"ema: warning: {each.version.average}: {each.warning}", err=True)
    if not made:
        raise refused[0][1]
    for what, reason in refused:
        typer.echo(f"ema: warning: {what}: {reason}", err=True)
    return made


def _evaluate(
    reader: Reader, version: Version, evaluator: Evaluate, task: str, device: str, traced: set[type[Exception]]
) -> None:
    """Evaluate a version and report the result, unless it has metrics for the task."""
    rows = (row for row in reader.metrics(version.run) if row.version == version.id and row.task == task)
    if any(row.error is None for row in rows):
        log.info("%s has metrics already", version)
        return
    outcome = measure(reader, version, evaluator, device, traced)
    reader.report(
        version,
        outcome.metrics,
        missing=outcome.missing,
        task=task,
        worker=socket.gethostname(),
        error=outcome.error,
        samples=outcome.samples,
        seconds=outcome.seconds,
    )
    log.info("%s", render.outcome_text(outcome))


def _scores(reader: Reader, run: str, made: Sequence[Synthesized], task: str) -> tuple[Score, ...]:
    """The results for the task, in the order in which the versions were asked for."""
    order = {each.version.id: number for number, each in enumerate(made)}
    rows = [row for row in reader.metrics(run) if row.version in order and row.task == task]
    return tuple(sorted(scores_of(rows), key=lambda score: order[score.version]))


def _line(made: Synthesized) -> str:
    return (
        f"{made.version}: estimated error {made.estimated_error:.2%} in the weights of the steps, rounding errors "
        f"{made.amplification:.1f} times those of the stored averages, made of {made.inputs} averages in "
        f"{made.snapshots} snapshots"
    )


def _text(
    run: str, made: Sequence[Synthesized], scores: Sequence[Score], ranking: Ranking, by: str | None, *, long: bool
) -> str:
    errors = {each.version.id: f"{each.estimated_error:.2%}" for each in made}
    lines = [scores_text(scores, ranking, by, long=long, others={"estimated_error": errors})]
    for name, (_, order) in ranking.items():
        for best in order[:1]:
            target = f"{run}/{best.average}@{render.shown_id(best.version, long=long)}"
            lines.append(f"best {name}: ema download {target}")
    return "\n".join(lines)
