"""The benchmarks at smoke sizes: they run, and say something. What they say at these sizes means nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import nginx
from benchmarks.result import Row, Section, Spread, interleaved


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_benchmark_runs_and_yields_finite_ratios(name: str) -> None:
    if name == "download" and nginx.program() is None:
        pytest.skip("there is no nginx here")

    section = command.BENCHMARKS[name](quick=True)

    assert section.rows
    for row in section.rows:
        assert all(math.isfinite(value) for value in (row.ratio.low, row.ratio.median, row.ratio.high)), row


def test_arms_take_turns_and_the_first_turn_does_not_count() -> None:
    called: list[str] = []

    def arm(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = interleaved(2, ours=lambda: arm("A"), rival=lambda: arm("B"))

    assert called == ["A", "B"] * 3
    assert found == {"ours": [3.0, 5.0], "rival": [4.0, 6.0]}


def test_a_ratio_is_taken_round_by_round() -> None:
    assert Spread.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3.0)


def test_figures_are_shown_with_median_and_both_ends() -> None:
    section = Section("title", "rival", (Row("what", "1 s", "2 s", Spread(0.5, 0.25, 12.345), "≤ 1"),), "note")

    assert section.markdown().splitlines()[-3:] == ["| what | 1 s | 2 s | 0.50 (0.25 to 12.3) | ≤ 1 |", "", "note"]


def test_writing_replaces_the_tables_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured -->\nold \\1\n<!-- end -->\nafter\n")
    monkeypatch.setattr(command, "README", readme)

    command.write("new \\1")
    command.write("newer \\1")

    assert readme.read_text() == "before\n<!-- measured -->\n\nnewer \\1\n\n<!-- end -->\nafter\n"


def test_the_readme_has_the_place_for_the_tables() -> None:
    text = command.README.read_text()

    assert text.count("<!-- measured -->\n") == text.count("<!-- end -->") == 1
    assert all(f"### {name}:" in text for name in command.BENCHMARKS)
