"""A ledger lists exactly the appended steps, as few ranges, and survives a round trip through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_server.rules.ledger import Ledger
from support.oracle import ledger_steps

_STEPS = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(
    lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
)


def _ledger(steps: list[int]) -> Ledger:
    ledger = Ledger(0)
    for step in steps:
        ledger.append(step)
    return ledger


@given(_STEPS)
def test_ledger_lists_exactly_the_appended_steps(steps: list[int]) -> None:
    ledger = _ledger(steps)

    assert list(ledger.steps()) == ledger_steps(ledger.to_json()) == steps
    assert (ledger.first_step, ledger.last_step) == (steps[0], steps[-1])
    assert ledger.set_steps == (steps[0],)


@given(_STEPS, st.integers(1, 70))
def test_tail_of_a_ledger_is_its_newest_steps(steps: list[int], count: int) -> None:
    assert _ledger(steps).tail(count) == tuple(steps[-count:])


@given(_STEPS, _STEPS)
def test_ledger_read_back_continues_unchanged(before: list[int], after: list[int]) -> None:
    """Also: what was read back is no longer tied to what it was read from."""
    steps = before + [before[-1] + step for step in after]
    written = json.loads(json.dumps(_ledger(before).to_json()))
    kept = json.dumps(written)
    ledger = Ledger.from_json(written)
    for step in steps[len(before) :]:
        ledger.append(step)

    assert ledger.to_json() == _ledger(steps).to_json()
    assert json.dumps(written) == kept


def test_million_steps_are_one_range_and_a_stride_is_kept() -> None:
    assert _ledger(list(range(1, 1_000_001))).to_json()["ranges"] == [[1, 1_000_000, 1]]
    assert _ledger(list(range(50, 1001, 50))).to_json()["ranges"] == [[50, 1000, 50]]
    assert _ledger([1, 2, 3, 7, 8, 9, 20]).to_json()["ranges"] == [[1, 3, 1], [7, 9, 1], [20, 20, 1]]


def test_replacement_is_listed_and_may_repeat_the_last_step() -> None:
    ledger = _ledger([1, 2])
    ledger.append(2, replaces=True)
    ledger.append(5, replaces=True)

    assert ledger.to_json() == {"origin": 0, "set": [1, 2, 5], "ranges": [[1, 2, 1], [5, 5, 1]]}


@pytest.mark.parametrize("step", [1, 2])
def test_step_must_be_above_the_last(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} does not follow step 2"):
        _ledger([1, 2]).append(step)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"origin": 0, "set": [1]},
        {"origin": -1, "set": [], "ranges": []},
        {"origin": 0, "set": ["1"], "ranges": []},
        {"origin": 0, "set": [], "ranges": [[1, 2]]},
        {"origin": 0, "set": [], "ranges": [[1, 4, 2]]},
        {"origin": 0, "set": [], "ranges": [[1, 4, 0]]},
        {"origin": 0, "set": [], "ranges": [[1, 4, 1], [4, 5, 1]]},
        {"origin": 0, "set": [], "ranges": [[4, 1, 1]]},
        {"origin": 0, "set": [], "ranges": [["1", "4", 1]]},
    ],
)
def test_invalid_json_is_not_a_ledger(value: Any) -> None:
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger.from_json(value)
