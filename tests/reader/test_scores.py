"""Reported metrics by version: merged, ranked, and with the direction that the metric's name says."""

from __future__ import annotations

import pytest

from ema_reader import MetricsRow, NotFound
from ema_reader.errors import UsageError
from ema_reader.scores import chosen_metric, direction_of, metric_names, ranked, scores_of


def _row(
    step: int, metrics: dict[str, float], *, task: str = "default", at: str = "1", error: str | None = None
) -> MetricsRow:
    return MetricsRow(f"{step:040x}", "raw", step, task, None, metrics, error, at)


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "val_loss",
        "valLoss",
        "CrossEntropyLoss",
        "MSELoss",
        "top1_error",
        "perplexity",
        "val/ppl",
        "NLL",
        "rmse",
    ],
)
def test_lower_is_better_for_such_names(name: str) -> None:
    assert direction_of(name).lower


@pytest.mark.parametrize("name", ["accuracy", "top1", "mIoU", "bleu", "f1", "auc", "terms", "kidney_dice", "psnr"])
def test_higher_is_better_for_every_other_name(name: str) -> None:
    assert not direction_of(name).lower


def test_requested_direction_overrides_the_name_and_has_a_reason() -> None:
    assert str(direction_of("loss", lower=False)) == "higher is better, as asked"
    assert str(direction_of("val_loss")) == "lower is better, because the name contains 'loss'"
    assert str(direction_of("top1")).startswith("higher is better, because")


def _missing(step: int, missing: dict[str, str], at: str = "1") -> MetricsRow:
    return MetricsRow(f"{step:040x}", "raw", step, "default", None, {"top1": 0.5}, None, at, missing)


def test_newest_report_decides_whether_a_metric_is_missing() -> None:
    then_finite = scores_of([_missing(1, {"loss": "nan"}), _row(1, {"loss": 0.5}, at="2")])[0]
    then_missing = scores_of([_row(1, {"loss": 0.5}), _missing(1, {"loss": "nan"}, at="2")])[0]

    assert (then_finite.metrics, then_finite.missing) == ({"top1": 0.5, "loss": 0.5}, {})
    assert (then_missing.metrics, then_missing.missing) == ({"top1": 0.5}, {"loss": "nan"})
    assert metric_names([then_missing]) == ("loss", "top1")
    assert ranked([then_missing], "loss", direction_of("loss")) == ()
    with pytest.raises(NotFound, match="no finite value of 'loss'"):
        chosen_metric("digits", [then_missing], "loss")


def test_tasks_are_merged_and_the_newest_report_counts() -> None:
    rows = [
        _row(2, {"loss": 0.5}),
        _row(1, {"loss": 0.9}, at="2"),
        _row(1, {"loss": 0.1}, at="1"),
        _row(1, {"accuracy": 0.8}, task="val"),
        _row(2, {}, task="val", error="ValueError: no data"),
    ]

    first, second = scores_of(rows)

    assert (first.step, first.metrics) == (1, {"loss": 0.9, "val/accuracy": 0.8})
    assert (second.metrics, second.errors) == ({"loss": 0.5}, {"val": "ValueError: no data"})
    assert metric_names([first, second]) == ("loss", "val/accuracy")


def test_later_success_replaces_a_failure() -> None:
    (score,) = scores_of([_row(1, {}, error="no", at="1"), _row(1, {"loss": 1.0}, at="2")])

    assert (score.metrics, score.errors) == ({"loss": 1.0}, {})


def test_ranking_is_by_value_then_by_later_step() -> None:
    scores = scores_of([_row(step, {"loss": loss}) for step, loss in ((1, 0.5), (2, 0.1), (3, 0.5), (4, 0.9))])

    assert [score.step for score in ranked(scores, "loss", direction_of("loss"))] == [2, 3, 1, 4]
    assert [score.step for score in ranked(scores, "loss", direction_of("loss", lower=False))] == [4, 3, 1, 2]


def test_metric_is_chosen_only_if_unambiguous() -> None:
    one, two = scores_of([_row(1, {"loss": 0.5})]), scores_of([_row(1, {"loss": 0.5, "accuracy": 1.0})])

    assert chosen_metric("r", one, None) == "loss"
    assert chosen_metric("r", two, "accuracy") == "accuracy"
    with pytest.raises(UsageError, match="accuracy, loss: choose one with --by"):
        chosen_metric("r", two, None)
    with pytest.raises(NotFound, match="it has loss"):
        chosen_metric("r", one, "top1")
    with pytest.raises(NotFound, match="no metrics yet"):
        chosen_metric("r", (), None)
