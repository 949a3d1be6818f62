"""Tables on a terminal of 80 columns, and values with units."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from typer.testing import CliRunner

from ema_cli.app import COMMANDS, build
from ema_reader.cli import render
from ema_reader.scores import Score
from ema_reader.values import Average, File, Ring, Run, Version

_FILES = (File("model.safetensors", 44_790_000, "0" * 64),)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_terminal_columns", lambda: 80)
    monkeypatch.setenv("NO_COLOR", "1")


def _version(step: int) -> Version:
    return Version("f" * 40, "resnet34", "ema-0.9999", "ema:0.9999", step, step, 12, "2026-01-01T00:00:00Z", _FILES)


def _run(name: str) -> Run:
    ring = Ring(0, None, None, None)
    return Run(name, "finished", 450_000, 450_000, 12.25, 450_000, 3, 0, None, (), ("power-0.1", "power-0.05"), ring)


def test_tables_fit_into_80_columns(narrow: None) -> None:
    score = Score("f" * 40, "ema-0.9999", 450_000, {"accuracy": 0.123456, "loss": 1.23456789}, {})
    tables = [
        render.status_text([_run("resnet34"), _run("digits")]),
        render.versions_text([_version(450_000), _version(1)], {"f" * 40: score}, long=False),
    ]

    for table in tables:
        assert max(map(len, table.splitlines())) <= 80, table


def test_an_average_that_is_too_long_is_a_line_below_the_table() -> None:
    long = Average("ema-0.9999", "ema:0.9999", 800, 0, 800, "float32", 0.9999, 6931.0, 400.0, 0.92, "92% of it is old")
    fine = replace(long, name="ema", warning=None)

    status = render.status_text([replace(_run("digits"), averages=(fine, long))]).splitlines()

    assert status[2:] == ["digits/ema-0.9999: 92% of it is old"]
    assert render.averages_text([fine, long]).splitlines()[3:] == ["ema-0.9999: 92% of it is old"]
    assert len(render.averages_text([fine]).splitlines()) == 2  # a title and a row


def test_wide_heading_breaks_at_underscores(narrow: None) -> None:
    lines = render.status_text([_run("resnet34-on-imagenet")]).splitlines()

    assert [line.split()[0] for line in lines[:2]] == ["run", "step"]
    assert "published_" in lines[0]
    assert "published_step" in render.table(["published_step"], [(1,)])


def test_long_output_has_full_ids_exact_sizes_and_times() -> None:
    text = render.versions_text([_version(7)], {}, long=True)

    assert all(part in text for part in ("f" * 40, "44790000", "2026-01-01T00:00:00Z", "half_life_steps"))
    assert "44.8 MB" in render.versions_text([_version(7)], {}, long=False)


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


@pytest.mark.parametrize("command", COMMANDS)
def test_short_and_long_help_are_the_same(command: str) -> None:
    short, long = (CliRunner().invoke(build(), [command, option]) for option in ("-h", "--help"))

    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "Usage" in short.stdout


def test_no_color_switches_styles_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    styled: Any = render.styled("x", bold=True)
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\x1b[" in styled
    assert render.styled("x", bold=True) == "x"
