"""After which step of several optimizers a snapshot is taken. `A` counts the steps."""

from __future__ import annotations

import pytest

from trainer_client.steps.rounds import PATIENCE, Rounds


def _taken(order: str, rounds: Rounds | None = None) -> tuple[list[int], list[int]]:
    """After how many steps each snapshot was taken; and of which of these only when the next step began."""
    rounds = rounds or Rounds(len(set(order)))
    taken, late = list[int](), list[int]()
    for done, letter in enumerate(order):
        member = ord(letter) - ord("A")
        if rounds.before(member):
            taken.append(done)
            late.append(done)
        if rounds.after(member):
            taken.append(done + 1)
    if rounds.pending:
        taken.append(len(order))
    return taken, late


def _ends(loop: str, count: int) -> list[int]:
    return [len(loop) * (n + 1) for n in range(count)]


@pytest.mark.parametrize("loop", ["A", "AB", "BA", "ABC", "CBA", "BAC", "ABBBBB", "BBBBBA", "BBACC", "ABBC"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_snapshot_is_taken_at_the_end_of_each_round(loop: str, count: int) -> None:
    taken, late = _taken(loop * count)

    assert taken == _ends(loop, count)
    assert [step for step in late if step > len(loop)] == [], "only the order of the first round is unknown"


def test_unknown_order_delays_snapshots_and_never_corrupts_them() -> None:
    taken, _ = _taken("ABCBC" * 7)

    assert taken == _ends("ABCBC", 7)


@pytest.mark.parametrize("count", [2, 5])
def test_critic_that_counts_steps_several_times_a_round(count: int) -> None:
    taken, _ = _taken("AAAAAB" * count)

    assert taken == [6 * n + k for n in range(count) for k in (1, 2, 3, 4, 6)]


def test_optimizer_that_steps_twice_a_round_with_others_in_between() -> None:
    taken, _ = _taken("ABAC" * 3)

    assert taken == [2, 4, 6, 8, 10, 12]


def test_skipped_step_of_another_delays_a_snapshot_and_does_not_corrupt_it() -> None:
    taken, late = _taken("AB" * 5 + "A" + "AB" * 5)

    assert taken == [*_ends("AB", 5), 11, *(11 + end for end in _ends("AB", 5))]
    assert 11 in late


def test_optimizer_that_never_steps_delays_only_the_first_snapshots() -> None:
    count = PATIENCE + 10
    taken, late = _taken("A" * count, Rounds(2))

    assert taken == list(range(1, count + 1))
    assert late == list(range(1, PATIENCE + 1))


def test_late_optimizer_is_awaited_from_its_second_round() -> None:
    count = PATIENCE + 10
    taken, _ = _taken("A" * count + "AB" * 3, Rounds(2))

    assert taken[count:] == [count + 1, count + 4, count + 6]


def test_changed_rate_skips_one_snapshot() -> None:
    taken, _ = _taken("AB" * 3 + "ABBB" * 3)

    assert taken == [2, 4, 6, 8, 14, 18]
