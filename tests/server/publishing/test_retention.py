"""The newest, the pinned and some older generations of a run are kept; one that a newer one repeats is not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ema_server.publishing.retention import expired
from ema_server.storage.catalog import Generation, Version


def _generation(seq: int, step: int, content: str, *, pinned: bool = False) -> Generation:
    version = Version(content * 40, "r", "raw", "raw", step, 0, 0, "", (), Path("g"), seq)
    return Generation("r", seq, step, pinned, False, Path("g"), (version,))


def _run(*marks: str) -> list[Generation]:
    """Generations, newest first; a mark is the content's letter, with `!` if pinned. The letter's place is the step."""
    count = len(marks)
    return [
        _generation(count - index, ord(mark[0]) - ord("a") + 1, mark[0], pinned=mark.endswith("!"))
        for index, mark in enumerate(marks)
    ]


def _gone(generations: list[Generation], keep: int) -> str:
    return "".join(generation.versions[0].id[0] for generation in expired(generations, keep))


@pytest.mark.parametrize(
    ("marks", "keep", "gone"),
    [
        ("", 3, ""),
        ("cba", 3, ""),
        ("dcba", 3, ""),
        ("edcba", 1, "dcb"),
        ("edcba", 2, "b"),
    ],
)
def test_the_newest_and_the_first_are_kept(marks: str, keep: int, gone: str) -> None:
    assert _gone(_run(*marks), keep) == gone


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_older_generations_are_kept_at_growing_distances(keep: int) -> None:
    kept: list[int] = []
    for step in range(1, 1001):
        generations = [_generation(at, at, chr(at)) for at in [step, *kept]]
        gone = {generation.seq for generation in expired(generations, keep)}
        kept = [at for at in [step, *kept] if at not in gone]
        assert kept[:keep] == list(range(step, max(0, step - keep), -1))
        assert kept[-1] == 1
        assert len(kept) == min(step, 2 * keep)

    ages = [1001 - step for step in kept[keep - 1 :]]
    even = (ages[-1] / ages[0]) ** (1 / keep)
    assert max(older / newer for newer, older in pairwise(ages)) <= even**2


def test_ten_pinned_generations_are_kept_besides() -> None:
    marks = ["z", "y", *(f"{letter}!" for letter in "onmlkjihgfedcb"), "a"]

    assert _gone(_run(*marks), 2) == "edcb"


def test_a_generation_repeated_by_a_rewind_expires_first() -> None:
    """Content a is the newest again: its older copy goes, and b and c keep their places."""
    assert [generation.seq for generation in expired(_run("a", "c", "b", "a"), 3)] == [1]


def test_a_generation_unreachable_after_a_rewind_is_not_kept_as_an_older_one() -> None:
    """After steps 1 to 9 the run went back to 4 and on: no later rewind can use the earlier 5 to 9."""
    before = [_generation(seq, seq, chr(seq)) for seq in range(9, 0, -1)]
    run = [_generation(11, 6, "f"), _generation(10, 4, chr(4)), *before]

    assert [generation.seq for generation in expired(run, 2)] == [9, 8, 7, 6, 5, 4, 2]


def test_a_repeated_generation_keeps_its_pin() -> None:
    assert expired(_run("a", "a!"), 3) == ()
    assert [generation.seq for generation in expired(_run("a!", "a"), 3)] == [1]
