"""Tables on a terminal of 80 columns, and values with units."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ema_cli.app import COMMANDS, build
from ema_reader.cli import render, tables
from ema_reader.scores import Score
from ema_reader.values import Average, File, Ledger, Ranks, Ring, Run, Version

_FILES = (File("model.safetensors", 44_790_000, "0" * 64),)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "terminal_width", lambda: 80)
    monkeypatch.setattr(render, "terminal_width", lambda: 80)
    monkeypatch.setenv("NO_COLOR", "1")


def _version(step: int) -> Version:
    return Version("f" * 40, "resnet34", "ema-0.9999", "ema:0.9999", step, step, 12, "2026-01-01T00:00:00Z", _FILES)


def _run(name: str) -> Run:
    ring = Ring(0, None, None, None)
    return Run(name, "finished", 450_000, 450_000, 12.25, 450_000, 3, 0, None, (), ("power-0.1", "power-0.05"), ring)


def _average(name: str, spec: str) -> Average:
    return Average(name, spec, 450_000, 3, 450_000, "float32", 0.9999, 6931.12, 9999.5, 0.00012)


_METRICS = {
    "accuracy": 0.123456,
    "top5": 0.5,
    "loss": 1.23456789,
    "robust/accuracy": 0.25,
    "robust/loss": 2.5,
    "ece": 0.1,
}
_SCORE = Score("f" * 40, "ema-0.9999", 450_000, _METRICS, {})
_AVERAGES = (_average("raw", "raw"), _average("ema-0.9999-head", "ema:0.9999:warmup=timm,gamma=10,only=head.*"))


@pytest.mark.parametrize(
    "spec", ["ema:0.9999", "ema:0.9999:warmup=timm,only=head.*", "ema:0.9:only=" + "layer.*|" * 99]
)
@pytest.mark.parametrize("name", ["mlp", "resnet34-on-imagenet"])
def test_tables_fit_into_80_columns_and_name_what_they_leave_out(narrow: None, name: str, spec: str) -> None:
    run = replace(_run(name), averages=_AVERAGES)
    score = replace(_SCORE, average="raw")
    shown = [
        render.status_text([run, _run("digits")]),
        render.newest_metrics_text(run, {"raw": score}),
        render.versions_text([_version(450_000), _version(1)], {"f" * 40: _SCORE}, long=False),
        render.averages_text([*_AVERAGES, _average(name, spec)]),
    ]

    for table in shown:
        assert max(map(len, table.splitlines())) <= 80, table
        assert "..." not in table
        assert "--long or --json" in " ".join(table.split())


def test_values_and_specs_are_whole_or_left_out(narrow: None) -> None:
    listed = render.versions_text([_version(450_000)], {"f" * 40: _SCORE}, long=False)
    averages = render.averages_text(_AVERAGES)

    assert listed.splitlines()[1].split() == [
        "ema-0.9999",
        "450000",
        "f" * 12,
        "0.123456",
        "0.1",
        "1.23457",
        "0.5",
        "0.25",
    ]
    assert "updates, gap_steps, size, created, robust/loss" in " ".join(listed.split())
    assert [line.split()[-1] for line in averages.splitlines()[1:3]] == [average.spec for average in _AVERAGES]


def test_long_and_piped_tables_have_every_column(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    versions = [_version(450_000)]
    long = render.versions_text(versions, {"f" * 40: _SCORE}, long=True)
    monkeypatch.setattr(tables, "terminal_width", lambda: None)
    piped = render.versions_text(versions, {"f" * 40: _SCORE}, long=False)

    for text in (long, piped):
        assert set(_METRICS) < set(text.splitlines()[0].split())
        assert "1.23457" in text


def test_columns_of_one_name_are_shown_or_left_out_together(narrow: None) -> None:
    def columns(width: int) -> list[str]:
        return (
            tables.table(("run", "step", "step"), [("a", "1", "1" * width)], optional=["step"]).splitlines()[0].split()
        )

    assert columns(40) == ["run", "step", "step"]
    assert columns(80) == ["run"]


def test_an_average_that_is_too_long_is_a_line_below_the_table() -> None:
    long = Average("ema-0.9999", "ema:0.9999", 800, 0, 800, "float32", 0.9999, 6931.0, 400.0, 0.92, "92% of it is old")
    fine = replace(long, name="ema", warning=None)

    status = render.status_text([replace(_run("digits"), averages=(fine, long))]).splitlines()

    assert status[2:] == ["digits/ema-0.9999: 92% of it is old"]
    assert render.averages_text([fine, long]).splitlines()[3:] == ["ema-0.9999: 92% of it is old"]
    assert len(render.averages_text([fine]).splitlines()) == 2  # a title and a row


def test_long_output_has_full_ids_exact_sizes_and_times() -> None:
    text = render.versions_text([_version(7)], {}, long=True)

    assert all(part in text for part in ("f" * 40, "44790000", "2026-01-01T00:00:00Z", "half_life_steps"))
    assert "44.8 MB" in render.versions_text([_version(7)], {}, long=False)


def test_ledger_shows_its_newest_steps_and_the_share_of_the_others() -> None:
    steps = tuple((step, 0.01) for step in range(100, 0, -1))
    ledger = Ledger("r", "swa", "f" * 40, "swa", None, None, 100, 0, steps, 0.0)

    lines = render.ledger_text(ledger, 20).splitlines()

    assert len(lines) == 22
    assert lines[1].split()[0] == "100"
    assert lines[-1] == "(80 older steps, with 0.8 of it, are not shown; --tail N or --json shows them)"
    assert len(render.ledger_text(ledger).splitlines()) == 101


def test_folder_of_a_download_is_a_sentence_on_a_terminal_and_bare_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, narrow: None
) -> None:
    assert render.folder_text(Path("best")) == "downloaded to best/"
    monkeypatch.setattr(render, "terminal_width", lambda: None)
    assert render.folder_text(Path("best")) == "best"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_999, "1000 kB")]
)
def test_sizes_have_units(nbytes: int, text: str) -> None:
    assert render.size_text(nbytes) == text


@pytest.mark.parametrize(
    ("created", "text"),
    [
        ("2026-01-01T11:59:50Z", "10 s ago"),
        ("2026-01-01T11:57:00Z", "3 min ago"),
        ("2026-01-01T07:00:00Z", "5 h ago"),
        ("2025-12-29T12:00:00Z", "3 d ago"),
        ("2026-01-01T12:00:09Z", "0 s ago"),
        ("yesterday", "yesterday"),
    ],
)
def test_ages_have_units(created: str, text: str) -> None:
    assert render.age_text(created, datetime(2026, 1, 1, 12, tzinfo=UTC)) == text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_into_80_columns_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group: Any = typer.main.get_command(build())
    options = [name for option in group.commands[command].params for name in option.opts] if command else COMMANDS

    shown = CliRunner().invoke(build(), [*filter(None, [command]), "--help"]).stdout

    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for repeated in ("cuda:0, ...", "[ARGS]...", "{DIR}..."):
        shown = shown.replace(repeated, "")
    assert "..." not in shown
    assert "<bool>" not in shown
    assert [name for name in options if name.startswith("-") or not command if name not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_short_and_long_help_are_the_same(command: str) -> None:
    short, long = (CliRunner().invoke(build(), [command, option]) for option in ("-h", "--help"))

    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "Usage" in short.stdout


def test_no_color_switches_styles_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    styled: Any = tables.styled("x", bold=True)
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\x1b[" in styled
    assert tables.styled("x", bold=True) == "x"


@pytest.mark.parametrize(
    ("seconds", "steps", "text"),
    [
        (300.0, None, "published every 300 s"),
        (0.5, 20, "published every 0.5 s and every 20 steps"),
        (None, 20, "published every 20 steps"),
        (None, None, "published on request only"),
    ],
)
def test_streaming_run_shows_how_often_it_is_published(seconds: float | None, steps: int | None, text: str) -> None:
    run = replace(_run("a"), state="active", publish_every_seconds=seconds, publish_every_steps=steps)

    assert render.publishing_text(run) == text
    assert render.publishing_text(replace(run, state="finished")) is None


def test_ranks_and_dropped_steps_of_a_sharded_trainer_are_shown() -> None:
    text = "rank 2 has not been heard for 10 s"
    ranks = {
        "world": 4,
        "present": 3,
        "missing": [2],
        "dropped_steps": 12,
        "dropped": [{"rank": 2, "reason": "silent", "steps": 9}, {"rank": None, "reason": "skipped", "steps": 3}],
        "last_dropped": {"step": 57, "rank": 2, "reason": "silent", "text": text, "at": "2026-01-01T00:00:00Z"},
    }
    run = replace(_run("llm"), ranks=Ranks.from_json(ranks))

    assert render.ranks_text(run) == (
        "3 of 4 ranks; 12 steps dropped since the server's start\n"
        "  rank 2 silent: 9\n"
        "  other ranks skipped: 3\n"
        f"  the last one is step 57: {text}"
    )
    assert "llm: 1 of 4 ranks are missing, no step counts without them: 2" in render.status_text([run])
    assert render.ranks_text(_run("llm")) is None
