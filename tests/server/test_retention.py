"""Of a run's generations the newest stay, and the newest pinned ones besides; a repetition takes nobody's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_server.catalog import Generation, Version
from ema_server.retention import expired


def _run(*marks: str) -> list[Generation]:
    """Generations, newest first; a mark is the content's letter, with `!` if pinned."""
    count = len(marks)
    return [
        Generation(
            "r",
            count - index,
            0,
            mark.endswith("!"),
            False,
            Path("g"),
            (Version(mark[0] * 40, "r", "raw", "raw", 0, 0, 0, "", (), Path("g"), count - index),),
        )
        for index, mark in enumerate(marks)
    ]


@pytest.mark.parametrize(
    ("marks", "keep", "gone"),
    [
        ("", 3, []),
        ("cba", 3, []),
        ("dcba", 3, ["a"]),
        ("edcba", 1, ["d", "c", "b", "a"]),
    ],
)
def test_the_newest_stay(marks: str, keep: int, gone: list[str]) -> None:
    assert [generation.versions[0].id[0] for generation in expired(_run(*marks), keep)] == gone


def test_ten_pinned_ones_stay_besides() -> None:
    marks = ["z", "y", *(f"{letter}!" for letter in "lkjihgfedcba"), "9"]

    assert [generation.versions[0].id[0] for generation in expired(_run(*marks), 2)] == ["b", "a", "9"]


def test_what_a_rewind_repeats_goes_first() -> None:
    """Content a is the newest again: its older copy goes, and b and c keep their places."""
    assert [generation.seq for generation in expired(_run("a", "c", "b", "a"), 3)] == [1]


def test_a_repetition_does_not_cost_a_pin() -> None:
    assert expired(_run("a", "a!"), 3) == ()
    assert [generation.seq for generation in expired(_run("a!", "a"), 3)] == [1]
