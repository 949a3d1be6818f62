"""`ema metrics`, `ema best`, and the metrics beside versions and averages."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import NotFound, Reader
from ema_reader.leases import Wanted
from support.served import Served


def _ema(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(build(), list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def scored(served: Served, reader: Reader) -> Served:
    """Two averages at two steps; accuracy is best for ema-0.9 at 200, loss for raw at 100."""
    values = {("raw", 100): (0.7, 0.2), ("ema-0.9", 100): (0.8, 0.5), ("raw", 200): (0.75, 0.4)}
    values["ema-0.9", 200] = (0.9, 0.3)
    for step in (100, 200):
        served.publish("digits", step, ["raw", "ema-0.9"])
        for average in ("raw", "ema-0.9"):
            accuracy, loss = values[average, step]
            reader.report(reader.version("digits", average), {"accuracy": accuracy, "loss": loss})
    return served


def test_table_has_a_column_per_metric_and_marks_the_best_value(scored: Served, url: str) -> None:
    code, table, _ = _ema("metrics", "digits", "--url", url)

    lines = [line.split() for line in table.splitlines()]
    assert code == 0
    assert lines[0] == ["step", "average", "version", "accuracy", "loss"]
    cells = {(line[0], line[1]): line[3:] for line in lines[1:5]}
    assert cells["200", "ema-0.9"] == ["0.9*", "0.3"]
    assert cells["100", "raw"] == ["0.7", "0.2*"]
    assert table.count("*") == 2 + 2, "two marks, and two lines that explain them"
    assert "* best loss: lower is better, because the name contains 'loss'" in table
    assert "* best accuracy: higher is better" in table


def test_by_metric_sorts_the_best_version_first(scored: Served, url: str) -> None:
    def order(*options: str) -> list[str]:
        return [line.split()[3] for line in _ema("metrics", "digits", "--url", url, *options)[1].splitlines()[1:5]]

    assert order("--by", "accuracy") == ["0.9*", "0.8", "0.75", "0.7"]
    assert order("--by", "accuracy", "--min") == ["0.7*", "0.75", "0.8", "0.9"]
    assert [
        line.split()[4] for line in _ema("metrics", "digits", "--url", url, "--by", "loss")[1].splitlines()[1:5]
    ] == [
        "0.2*",
        "0.3",
        "0.4",
        "0.5",
    ]


def test_csv_and_json_have_full_ids_and_every_value(scored: Served, url: str, reader: Reader) -> None:
    rows = list(csv.DictReader(io.StringIO(_ema("metrics", "digits", "--url", url, "--csv")[1])))
    report = json.loads(_ema("metrics", "digits", "--url", url, "--json")[1])

    ids = {row.version for row in reader.metrics("digits")}
    assert {row["version"] for row in rows} == {row["version"] for row in report["metrics"]} == ids
    assert [(row["step"], row["loss"]) for row in rows if row["average"] == "raw"] == [("100", "0.2"), ("200", "0.4")]
    assert (report["best"]["accuracy"]["average"], report["best"]["accuracy"]["step"]) == ("ema-0.9", 200)
    assert report["best"]["loss"]["direction"] == {"lower": True, "reason": "because the name contains 'loss'"}


def test_best_prints_the_version_and_downloads_it(scored: Served, url: str, tmp_path: Path, reader: Reader) -> None:
    version = reader.version("digits", "ema-0.9")

    code, shown, _ = _ema("best", "digits", "--by", "accuracy", "--url", url)
    _, downloaded, _ = _ema("best", "digits", "--by", "accuracy", "--url", url, "--download", str(tmp_path / "best"))
    _, lowest, _ = _ema("best", "digits", "--by", "accuracy", "--min", "--url", url, "--json")

    assert (code, shown.splitlines()[1].split()) == (0, ["ema-0.9", "200", version.id[:12], "0.9"])
    assert "accuracy: higher is better" in shown
    assert downloaded.splitlines()[-1] == str(tmp_path / "best")
    assert json.loads((tmp_path / "best" / "version.json").read_text())["id"] == version.id
    assert json.loads(lowest)["version"]["average"] == "raw"


def test_best_is_of_stored_versions_and_reports_a_better_deleted_one(scored: Served, url: str, reader: Reader) -> None:
    scored.catalog.remove(scored.catalog.generations("digits")[0], force=True)  # step 200

    code, shown, warning = _ema("best", "digits", "--by", "accuracy", "--url", url)

    assert (code, shown.splitlines()[1].split()[:2]) == (0, ["ema-0.9", "100"])
    assert "better versions that are no longer stored: 1" in warning
    assert reader.best("digits", "loss").better_deleted == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("best", "digits"), 2, "accuracy, loss: choose one with --by"),
        (("best", "digits", "--by", "top1"), 3, "no metric 'top1'"),
        (("metrics", "digits", "--by", "top1"), 3, "no metric 'top1'"),
        (("metrics", "digits", "--json", "--csv"), 2, "choose one"),
        (("metrics", "nope"), 3, "nope"),
        (("best", "nope"), 3, "nope"),
        (("metrics", "a/b"), 2, "run name 'a/b'"),
        (("best", ","), 2, "run name ','"),
    ],
)
def test_invalid_request_is_one_line(
    scored: Served, url: str, arguments: tuple[str, ...], code: int, text: str
) -> None:
    found, out, error = _ema(*arguments, "--url", url)

    assert (found, out, len(error.splitlines())) == (code, "", 1)
    assert text in error


def test_run_without_metrics_has_an_empty_table_and_no_best_version(served: Served, url: str, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"])

    assert _ema("metrics", "digits", "--url", url)[:2] == (0, "no metrics yet\n")
    assert _ema("best", "digits", "--url", url)[0] == 3
    with pytest.raises(NotFound, match="no metrics yet"):
        reader.best("digits")


def test_a_missing_metric_is_shown_with_its_reason_and_is_never_the_best(
    served: Served, url: str, reader: Reader
) -> None:
    served.publish("digits", 100, ["raw", "ema-0.9"])
    reader.report(reader.version("digits", "raw"), {"top1": 0.5, "loss": float("nan")})
    reader.report(reader.version("digits", "ema-0.9"), {"top1": 0.6, "loss": 0.25})
    served.publish("digits", 200, ["raw"])
    lease, _ = reader.leases.ask(Wanted("w", "default", "digits", ("raw",)))
    assert lease is not None
    why = {"auc": "NoneType 'None', not a number"}
    reader.leases.settle(lease, {"top1": 0.4}, missing=why, error=None, samples=None, seconds=1.0)

    table = _ema("metrics", "digits", "--url", url)[1]
    cells = {tuple(line.split()[:2]): line.split()[3:] for line in table.splitlines()}
    rows = list(csv.DictReader(io.StringIO(_ema("metrics", "digits", "--url", url, "--csv")[1])))
    text = _ema("metrics", "digits", "--url", url, "--json")[1]
    shown = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    status = _ema("status", "digits", "--url", url)[1]

    assert cells["100", "raw"] == ["-", "nan", "0.5"]
    assert cells["200", "raw"] == ["missing", "-", "0.4"]
    assert "raw at step 200: auc is missing: NoneType 'None', not a number" in table
    assert [row["loss"] for row in rows] == ["0.25", "nan", ""]
    assert [score["missing"] for score in shown["metrics"]] == [{}, {"loss": "nan"}, why]
    assert sorted(shown["best"]) == ["loss", "top1"]
    assert shown["best"]["loss"]["value"] == 0.25
    assert ["raw", "200", "missing", "-", "0.4"] in [line.split() for line in status.splitlines()]
    assert _ema("best", "digits", "--by", "auc", "--url", url)[0] == 3


def test_failed_evaluation_is_a_line_below_the_table(served: Served, url: str, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"])
    reader.report(reader.version("digits", "raw"), error="ValueError: no data\nin line 3")

    _, table, _ = _ema("metrics", "digits", "--url", url)

    assert table.splitlines()[-1] == "raw at step 100: task default failed: ValueError: no data"


def test_status_and_versions_show_the_newest_metrics(scored: Served, url: str) -> None:
    _, status, _ = _ema("status", "digits", "--url", url)
    _, versions, _ = _ema("versions", "digits", "--url", url)
    in_status = json.loads(_ema("status", "digits", "--url", url, "--json")[1])["runs"][0]["averages"]
    in_versions = json.loads(_ema("versions", "digits/raw", "--url", url, "--json")[1])["versions"]

    assert ["average", "metrics_step", "accuracy", "loss"] in [line.split() for line in status.splitlines()]
    assert ["ema-0.9", "200", "0.9", "0.3"] in [line.split() for line in status.splitlines()]
    assert versions.splitlines()[0].split()[-2:] == ["accuracy", "loss"]
    assert [line.split()[-2:] for line in versions.splitlines() if line.startswith("raw")] == [
        ["0.75", "0.4"],
        ["0.7", "0.2"],
    ]
    assert [(a["name"], a["metrics_step"], a["metrics"]["loss"]) for a in in_status] == [
        ("raw", 200, 0.4),
        ("ema-0.9", 200, 0.3),
    ]
    assert [v["metrics"]["accuracy"] for v in in_versions] == [0.75, 0.7]
