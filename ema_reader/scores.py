"""Reported metrics by version: merged over tasks and workers, and ranked. Pure: no requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ema_reader.errors import NotFound, UsageError
from ema_reader.values import MetricsRow, Version

# Words of a metric's name that say that lower is better.
_LOWER_WORDS = frozenset(
    {
        *("loss", "error", "errors", "err", "perplexity", "ppl", "nll", "entropy", "divergence", "distance", "kl"),
        *("bpb", "bpc", "bpd", "mse", "rmse", "nmse", "mae", "mape", "wer", "cer", "ter", "eer", "fid", "kid", "lpips"),
        *("brier", "ece", "latency"),
    }
)
_LOWER_PART = re.compile(r"loss|error|perplexity")


@dataclass(frozen=True, slots=True)
class Score:
    """The metrics of one version: the newest report of each task; `errors` of tasks whose evaluation failed.

    A metric of a task other than `default` is named `TASK/METRIC`. `missing` has the metrics whose newest value is not
    finite, each with the reason.
    """

    version: str
    average: str
    step: int
    metrics: dict[str, float]
    errors: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Direction:
    """Whether a lower value of a metric is better, and how that was decided."""

    lower: bool
    reason: str

    def __str__(self) -> str:
        return f"{'lower' if self.lower else 'higher'} is better, {self.reason}"


@dataclass(frozen=True, slots=True)
class Best:
    """The best version of a run that is still stored, by one metric.

    `better_deleted` counts versions with a better value that the server no longer has.
    """

    version: Version
    metric: str
    value: float
    direction: Direction
    better_deleted: int


def scores_of(rows: Iterable[MetricsRow]) -> tuple[Score, ...]:
    """One score for each version with reports, by step and average; of several workers the newest report counts."""
    found: dict[str, Score] = {}
    for row in sorted(rows, key=lambda row: (row.step, row.average, row.at)):
        score = found.setdefault(row.version, Score(row.version, row.average, row.step, {}, {}))
        prefix = "" if row.task == "default" else f"{row.task}/"
        for name in (*row.metrics, *row.missing):
            score.metrics.pop(prefix + name, None)
            score.missing.pop(prefix + name, None)
        score.metrics.update({prefix + name: value for name, value in row.metrics.items()})
        score.missing.update({prefix + name: reason for name, reason in row.missing.items()})
        if row.error is None:
            score.errors.pop(row.task, None)
        else:
            score.errors[row.task] = row.error
    return tuple(found.values())


def metric_names(scores: Iterable[Score]) -> tuple[str, ...]:
    """The names of all metrics, missing ones too, in alphabetical order, those of the task `default` first."""
    names = {name for score in scores for name in (*score.metrics, *score.missing)}
    return tuple(sorted(names, key=lambda name: ("/" in name, name)))


def direction_of(metric: str, lower: bool | None = None) -> Direction:
    """Whether lower is better: as asked (`lower`), else by the words of the metric's name, else no."""
    if lower is not None:
        return Direction(lower, "as asked")
    name = metric.rpartition("/")[2]
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    for word in words:
        if word.lower() in _LOWER_WORDS or _LOWER_PART.search(word.lower()):
            return Direction(True, f"because the name contains {word!r}")
    return Direction(False, "because the name contains neither loss nor error")


def ranked(scores: Iterable[Score], metric: str, direction: Direction) -> tuple[Score, ...]:
    """The scores that have a finite value of the metric, best first; of equal ones the one of the later step."""
    sign = 1.0 if direction.lower else -1.0
    having = [score for score in scores if metric in score.metrics]
    return tuple(sorted(having, key=lambda score: (sign * score.metrics[metric], -score.step)))


def chosen_metric(run: str, scores: Sequence[Score], by: str | None) -> str:
    """The metric to rank by: `by`, else the only one.

    Raises:
        NotFound: the run has no metrics, or no finite value of this one.
        UsageError: there are several, and `by` is None.
    """
    names = metric_names(scores)
    if not names:
        raise NotFound(f"run {run!r} has no metrics yet: start ema evaluate, or the server with --evaluate")
    if by is None and len(names) == 1:
        by = names[0]
    if by is None:
        raise UsageError(f"run {run!r} has the metrics {', '.join(names)}: choose one with --by")
    if by not in names:
        raise NotFound(f"run {run!r} has no metric {by!r}; it has {', '.join(names)}")
    if not any(by in score.metrics for score in scores):
        raise NotFound(f"run {run!r} has no finite value of {by!r}: ema metrics {run} shows what was reported")
    return by
