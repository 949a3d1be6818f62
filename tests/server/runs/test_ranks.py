"""What is known of the ranks of sharded trainers."""

from __future__ import annotations

from ema_server.runs.ranks import RANKS_COUNTED_MAX, DroppedSteps, LastDropped, RanksStore, ranks_text

AT = "2026-01-01T00:00:00Z"


def test_runs_of_one_rank_have_no_status() -> None:
    store = RanksStore()
    store.joined("run", 1, is_new=True)
    store.dropped("run", LastDropped(1, 0, "skipped", "rank 0 skipped it: busy", AT))

    assert store.get("run") is None


def test_missing_ranks_are_not_present_and_return_with_the_next_trainer() -> None:
    store = RanksStore()
    store.joined("run", 4, is_new=True)
    assert store.set_missing("run", (1, 3)) == ()
    found = store.get("run")
    assert found is not None
    assert (found.world, found.present, found.missing) == (4, 2, (1, 3))
    store.left("run")
    found = store.get("run")
    assert found is not None
    assert (found.present, found.missing) == (0, ())
    store.joined("run", 2, is_new=False)
    found = store.get("run")
    assert found is not None

    assert (found.world, found.present) == (2, 2)


def test_steps_are_counted_by_rank_and_reason_of_a_bounded_number_of_ranks() -> None:
    store = RanksStore()
    store.joined("run", 1000, is_new=True)
    for step in range(1000):
        store.dropped("run", LastDropped(step, step, "skipped", "busy", AT))
    store.dropped("run", LastDropped(1000, 5, "lost", "rank 5 is lost", AT))
    found = store.get("run")
    assert found is not None

    assert len(found.dropped) == RANKS_COUNTED_MAX + 2
    assert found.dropped_steps == 1001
    assert DroppedSteps(5, "lost", 1) in found.dropped
    assert DroppedSteps(5, "skipped", 1) in found.dropped
    assert found.dropped[-1] == DroppedSteps(None, "skipped", 1000 - RANKS_COUNTED_MAX)
    assert found.last_dropped == LastDropped(1000, 5, "lost", "rank 5 is lost", AT)


def test_status_follows_a_run_that_is_renamed_and_ends_when_it_is_deleted() -> None:
    store = RanksStore()
    store.joined("run", 2, is_new=True)
    store.rename("run", "run.1")
    assert store.get("run") is None
    assert store.get("run.1") is not None
    store.remove("run.1")

    assert store.get("run.1") is None


def test_text_names_at_most_eight_ranks() -> None:
    assert ranks_text((3,)) == "rank 3"
    assert ranks_text((3, 5)) == "ranks 3, 5"
    assert ranks_text(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 others"
