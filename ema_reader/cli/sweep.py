"""What `synthesize` and `blend` share: to make several versions, to evaluate each, and to name the best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import typer

from ema_reader.cli import render
from ema_reader.cli.evaluate import evaluator_of
from ema_reader.cli.metrics import best_json, ranking_of, scores_text
from ema_reader.cli.options import check_label, log_to_stderr
from ema_reader.derived import Blended, Synthesized
from ema_reader.errors import RequestRefused, UsageError
from ema_reader.evaluation.user_function import Evaluate, check_device
from ema_reader.evaluation.worker import evaluate_version
from ema_reader.reader import Reader
from ema_reader.scores import Score, chosen_metric, scores_of
from ema_reader.values import Version

log = logging.getLogger(__name__)

Function = Annotated[
    str | None, typer.Option("--evaluate", metavar="MODULE:FUNCTION", help="Evaluate each, and name the best.")
]
Task = Annotated[str, typer.Option("--task", help="Name under which the metrics are reported.")]
Device = Annotated[str, typer.Option("--device", help="Where weights are loaded: cpu, cuda:0, ...")]
RecalibrateBn = Annotated[
    str | None,
    typer.Option("--recalibrate-bn", metavar="MODULE:LOADER", help="Recompute BatchNorm statistics first."),
]

Made = TypeVar("Made", Synthesized, Blended)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How versions are evaluated, for which task, and by which metric they are ranked."""

    evaluator: Evaluate
    task: str
    device: str
    by: str | None
    lower: bool | None


def evaluation_of(
    function: str | None, loader: str | None, task: str, device: str, by: str | None, lower: bool | None
) -> Evaluation | None:
    """The evaluation that the options ask for; None without a function. Logs go to stderr from then on.

    Raises:
        UsageError: a function cannot be imported, an option is invalid, or belongs to --evaluate and that is missing.
    """
    if function is None:
        if loader is not None or by is not None or lower is not None:
            raise UsageError("--recalibrate-bn, --by, --min and --max belong to --evaluate: give a function")
        return None
    log_to_stderr()
    evaluator = evaluator_of(function, loader)
    check_device(device)
    return Evaluation(evaluator, check_label("--task", task), device, by, lower)


def make_each(asked: Mapping[str, Callable[[], Made]]) -> list[Made]:
    """Make what can be made, by its name in warnings; what the server refuses is a warning.

    Raises:
        RequestRefused: nothing can be made.
    """
    made, refused = list[Made](), dict[str, RequestRefused]()
    for name, make in asked.items():
        try:
            made.append(make())
        except RequestRefused as refusal:
            refused[name] = refusal
    if not made:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        typer.echo(f"ema: warning: {name} was not made: {reason}", err=True)
    return made


def evaluated(
    reader: Reader,
    key: str,
    made: Sequence[Made],
    evaluation: Evaluation,
    columns: Mapping[str, Callable[[Made], str]],
    *,
    long: bool,
    json: bool,
) -> tuple[str, bool]:
    """Evaluate each version; the table or the JSON of the results, and whether every evaluation succeeded.

    Args:
        reader: the connection to the server.
        key: the key of the versions in the JSON.
        made: the versions, one or more.
        evaluation: how.
        columns: more columns of the table, by name.
        long: whether the table shows full ids.
        json: whether the result is JSON.
    """
    versions = [each.version for each in made]
    run = versions[0].run
    traced: set[type[Exception]] = set()
    for version in versions:
        outcome = evaluate_version(reader, version, evaluation.evaluator, evaluation.task, evaluation.device, traced)
        if outcome is not None:
            log.info("%s", render.outcome_text(outcome))
    scores = _scores(reader, run, versions, evaluation.task)
    ranking = ranking_of(scores, evaluation.by, evaluation.lower)
    good = not any(score.errors for score in scores)
    if evaluation.by is not None:
        scores = ranking[chosen_metric(run, scores, evaluation.by)][1]
    if json:
        return render.as_json({key: made, "metrics": scores, "best": best_json(ranking)}), good
    others = {name: {each.version.id: text(each) for each in made} for name, text in columns.items()}
    lines = [scores_text(scores, ranking, evaluation.by, long=long, others=others)]
    for name, (_, order) in ranking.items():
        for best in order[:1]:
            target = f"{run}/{best.average}@{render.shown_id(best.version, long=long)}"
            lines.append(f"best {name}: ema download {target}")
    return "\n".join(lines), good


def _scores(reader: Reader, run: str, versions: Sequence[Version], task: str) -> tuple[Score, ...]:
    """The results for the task, in the order in which the versions were asked for."""
    order = {version.id: number for number, version in enumerate(versions)}
    rows = [row for row in reader.metrics(run) if row.version in order and row.task == task]
    return tuple(sorted(scores_of(rows), key=lambda score: order[score.version]))
