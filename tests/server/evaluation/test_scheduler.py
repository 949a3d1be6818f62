"""Leases and validations: one worker for each version and task, whole steps in turn, on the server's clock alone."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ema_server.evaluation.lease_queries import ATTEMPTS_MAX
from ema_server.evaluation.leases import Ask, Finding, Lease
from ema_server.evaluation.metric_store import MetricStore, Subject
from ema_server.evaluation.scheduler import REQUEST_HOLD_S, Validations
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served

GOOD = Finding({"accuracy": 0.5}, None, 10, 0.1)
Result = TypeVar("Result")


class Scheduling:
    """The validations of a served folder, on a clock that only the test moves."""

    def __init__(self, served: Served, metrics: MetricStore) -> None:
        self.now = 1_000_000.0
        self.served = served
        self.validations = Validations(served.catalog, served.statuses, metrics, lambda: self.now)

    def ask(self, worker: str = "w", *, every: int = 1, skip: tuple[str, ...] = (), **wanted: Any) -> Lease | None:
        ask = Ask(worker, **{"task": "default", "run": "digits", "lease_s": 30.0, **wanted})
        grant = run(self.validations.ask(ask, every=every, skip=frozenset(skip), poll_s=1.0))
        self.held = grant.held
        return grant.lease

    def take(self, worker: str = "w", **wanted: Any) -> Lease:
        lease = self.ask(worker, **wanted)
        assert lease is not None
        return lease

    def settle(self, lease: Lease, finding: Finding = GOOD) -> bool:
        return run(self.validations.settle(lease.id, finding)) is not None

    def request(self, step: int, *, again: bool = False, possible: bool = True, task: str = "default") -> Any:
        version = self.served.catalog.find("digits", "raw", f"step-{step}")
        assert version is not None
        return run(self.validations.request(version, task, again=again, possible=possible))

    def result(self, validation: Any) -> Finding | None:
        found = run(self.validations.find("digits", validation.id))
        assert found is not None
        return found.finding

    def prune(self, step: int) -> bool:
        generation = next(item for item in self.served.catalog.generations("digits") if item.step == step)
        return self.served.catalog.remove(generation)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


@pytest.fixture
def scheduling(tmp_path: Path) -> Iterator[Scheduling]:
    served = Served(tmp_path / "data")
    served.publish("digits", 100, ["raw"])
    yield Scheduling(served, served.metrics)
    served.close()


def test_version_is_leased_to_one_worker_and_counted_as_held_for_others(scheduling: Scheduling) -> None:
    lease = scheduling.take("first")

    assert (lease.subject.step, scheduling.held) == (100, 0)
    assert (scheduling.ask("second"), scheduling.held) == (None, 1)


def test_worker_for_all_runs_gets_only_runs_with_a_trainer_since_the_start(scheduling: Scheduling) -> None:
    scheduling.served.show("digits", 100, ["raw"], RunState.FINISHED, is_current=False)
    assert scheduling.ask(run=None) is None
    scheduling.request(100)
    asked_for = scheduling.take(run=None)
    assert asked_for.subject.run == "digits"
    run(scheduling.validations.give_back(asked_for.id))
    assert scheduling.ask(run="digits") is not None


def test_lease_without_heartbeats_is_taken_over_by_the_next_worker(scheduling: Scheduling) -> None:
    lease = scheduling.take("first")
    for _ in range(5):
        scheduling.now += 29
        assert run(scheduling.validations.beat(lease.id)) is not None
        assert scheduling.ask("second") is None
    scheduling.now += 31
    taken = scheduling.take("second")

    assert taken.subject == lease.subject
    assert run(scheduling.validations.beat(lease.id)) is None
    assert not scheduling.settle(lease)
    assert scheduling.settle(taken)


def test_late_result_counts_unless_another_worker_took_over(scheduling: Scheduling) -> None:
    lease = scheduling.take()
    scheduling.now += 1000

    assert scheduling.settle(lease)
    assert scheduling.ask() is None


def test_result_sent_twice_is_stored_once(scheduling: Scheduling) -> None:
    lease = scheduling.take()
    first, again = (run(scheduling.validations.settle(lease.id, GOOD)) for _ in range(2))

    assert first is not None
    assert again is not None
    assert (first[1], again[1]) == (True, False)
    assert len(scheduling.served.metrics.reports("digits").result(WAIT_S)) == 1


def test_version_with_metrics_is_due_for_other_tasks_only(scheduling: Scheduling) -> None:
    scheduling.settle(scheduling.take())

    assert scheduling.ask("another") is None
    assert scheduling.take(task="robustness").task == "robustness"


def test_failed_version_is_leased_to_a_worker_that_has_not_failed_on_it(scheduling: Scheduling) -> None:
    lease = scheduling.take()
    scheduling.settle(lease, Finding(error="ValueError: no"))

    assert scheduling.ask(skip=(lease.subject.version,)) is None
    assert scheduling.ask("another") is not None


def test_returned_lease_is_free_at_once_and_counts_no_attempt(scheduling: Scheduling) -> None:
    for _ in range(ATTEMPTS_MAX + 2):
        run(scheduling.validations.give_back(scheduling.take().id))

    assert scheduling.ask("another") is not None


def test_leases_of_a_dead_worker_are_free_at_once(scheduling: Scheduling) -> None:
    scheduling.take("server")
    scheduling.take("other", task="robustness")
    scheduling.validations.abandon("server")

    assert scheduling.take("next").subject.step == 100
    assert scheduling.ask("next", task="robustness") is None


def test_version_that_crashes_its_workers_is_reported_and_left_until_requested(
    scheduling: Scheduling,
) -> None:
    for number in range(ATTEMPTS_MAX):
        scheduling.take(f"w{number}")
        scheduling.now += 31

    assert scheduling.ask("next") is None
    rows = scheduling.served.metrics.reports("digits").result(WAIT_S)
    assert [row.worker for row in rows] == [f"w{ATTEMPTS_MAX - 1}"]
    assert "vanished" in str(rows[0].error)
    scheduling.request(100)
    assert scheduling.ask("next") is not None


def test_newest_version_of_each_average_of_each_run_is_due(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.served.publish("other", 7, ["raw"])
    found = [scheduling.take(run=None).subject for _ in range(3)]

    assert [(item.run, item.average, item.step) for item in found] == [
        ("digits", "raw", 200),
        ("digits", "ema-0.9", 200),
        ("other", "raw", 7),
    ]
    assert scheduling.ask(run=None) is None


def test_every_nth_version_and_the_last_of_a_finished_run_are_due(scheduling: Scheduling) -> None:
    found = []
    for step in range(100, 700, 100):
        if step > 100:
            scheduling.served.publish("digits", step, ["raw"])
        if (lease := scheduling.ask(every=3)) is not None:
            found.append(lease.subject.step)
            scheduling.settle(lease)
    scheduling.served.show("digits", 600, ["raw"], RunState.FINISHED)
    last = scheduling.take(every=3)

    assert found == [100, 400]
    assert last.subject.step == 600


def evaluate_while_publishing(scheduling: Scheduling, workers: int, until: float) -> list[tuple[float, str, int]]:
    """Publish three averages every 10 s and evaluate each version in about 6 s; returns time, average, step of results.

    Retention keeps three generations, as far as their versions are not held.
    """
    averages, start, results, step = ["raw", "ema-0.9", "ema-0.99"], scheduling.now, [], 100
    events: list[tuple[float, int, Lease | None]] = [(start + 0.1 * number, number, None) for number in range(workers)]
    next_publish = start
    while events:
        scheduling.now, number, lease = heapq.heappop(events)
        while next_publish <= scheduling.now and next_publish < start + until:
            step, next_publish = step + 100, next_publish + 10
            scheduling.served.publish("digits", step, averages)
            for old in scheduling.served.catalog.generations("digits")[3:]:
                scheduling.served.catalog.remove(old)
        if next_publish >= start + until:
            scheduling.served.show("digits", step, averages, RunState.FINISHED)
        if lease is not None:
            assert scheduling.settle(lease)
            results.append((scheduling.now, lease.subject.average, lease.subject.step))
        lease = scheduling.ask(f"w{number}")
        if lease is not None:
            heapq.heappush(events, (scheduling.now + 6 + 0.1 * number, number, lease))
        elif scheduling.now < start + until:
            heapq.heappush(events, (scheduling.now + 1, number, None))
    return results


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_averages_are_evaluated_equally_often_when_evaluation_is_slower_than_publishing(
    scheduling: Scheduling, workers: int
) -> None:
    results = evaluate_while_publishing(scheduling, workers, 300.0)

    counts: Counter[str] = Counter()
    for _, average, _ in results:
        counts[average] += 1
        if workers == 1:
            assert max(counts.values()) - min(counts[name] for name in ("raw", "ema-0.9", "ema-0.99")) <= 1
    assert len(set(counts.values())) == 1, counts
    by_step = Counter(step for _, _, step in results)
    assert set(by_step.values()) == {3}, "every result has its control beside it"
    assert max(by_step) == 100 + 30 * 100, "the last step"
    assert len(by_step) >= 300 / 18 - 1, "the worker was never idle"


def test_step_in_progress_is_completed_before_the_newest_step_begins(scheduling: Scheduling) -> None:
    names = ["raw", "ema-0.9", "ema-0.99"]
    scheduling.served.publish("digits", 200, names)
    first = scheduling.take()
    scheduling.served.publish("digits", 300, names)
    scheduling.served.publish("digits", 400, names)
    scheduling.settle(first)
    rest = [scheduling.take("w2").subject, scheduling.take("w3").subject]
    newest = scheduling.take("w4").subject

    assert [(item.average, item.step) for item in (first.subject, *rest)] == [(name, 200) for name in names]
    assert (newest.average, newest.step) == ("raw", 400)


def test_requested_version_precedes_the_step_in_progress_and_begins_no_step(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.served.publish("digits", 300, ["raw", "ema-0.9"])
    begun = scheduling.take()
    scheduling.request(200)
    requested = scheduling.take("w2")
    for lease in (begun, requested):
        scheduling.settle(lease)
    scheduling.served.publish("digits", 400, ["raw", "ema-0.9"])
    after = [scheduling.take(f"w{number}").subject for number in range(3)]

    assert (begun.subject.step, requested.subject.step) == (300, 200)
    assert [(item.average, item.step) for item in after] == [("ema-0.9", 300), ("raw", 400), ("ema-0.9", 400)]


def test_step_in_progress_is_kept_between_two_evaluations(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.settle(scheduling.take())
    between = scheduling.prune(200)
    scheduling.settle(scheduling.take())
    scheduling.now += 31

    assert (between, scheduling.prune(200)) == (False, True)


def test_step_in_progress_without_a_worker_is_pruned_and_not_offered(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.settle(scheduling.take())
    scheduling.now += 31
    assert scheduling.prune(200)
    scheduling.served.publish("digits", 300, ["raw"])

    assert scheduling.take().subject.step == 300


def test_failed_version_completes_its_step_for_every_worker(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw"])
    failed = scheduling.take()
    scheduling.settle(failed, Finding(error="ValueError: no"))
    scheduling.served.publish("digits", 300, ["raw"])

    assert scheduling.take("another").subject.step == 300


def test_step_in_progress_is_completed_after_a_restart(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.settle(scheduling.take())
    scheduling.served.publish("digits", 300, ["raw", "ema-0.9"])
    with closing(MetricStore(scheduling.served.data / "metrics.sqlite")) as reopened:
        restarted = Scheduling(scheduling.served, reopened)

        assert [restarted.take(name).subject.step for name in ("w1", "w2", "w3")] == [200, 300, 300]


def test_worker_for_one_average_evaluates_no_other(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.settle(scheduling.take(averages=("raw",)))
    scheduling.served.publish("digits", 300, ["raw", "ema-0.9"])

    assert scheduling.take(averages=("raw",)).subject.step == 300


def test_derived_version_precedes_a_new_step(scheduling: Scheduling) -> None:
    folder = scheduling.served.data / "runs" / "digits" / "derived" / "00000001-000000000100"
    folder.mkdir(parents=True)
    base = scheduling.served.catalog.versions("digits", "raw")[0]
    scheduling.served.catalog.add_derived(
        replace(base, id="d" * 40, average="power-0.05", folder=folder, seq=1, derived="synthesized")
    )
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])

    assert scheduling.take().subject.average == "power-0.05"
    assert scheduling.take("another").subject.step == 200


def test_runs_take_turns_when_evaluation_is_slower_than_publishing(scheduling: Scheduling) -> None:
    given = []
    for step in range(200, 1000, 100):
        for name in ("digits", "other"):
            scheduling.served.publish(name, step, ["raw", "ema-0.9"])
        lease = scheduling.take(run=None)
        given.append(lease.subject.run)
        scheduling.settle(lease)

    assert given == ["digits", "digits", "other", "other"] * 2


def test_leased_version_is_not_pruned_until_the_lease_ends_or_expires(scheduling: Scheduling) -> None:
    lease = scheduling.take()
    held = scheduling.prune(100)
    scheduling.now += 31
    expired = scheduling.prune(100)

    assert (held, expired) == (False, True)
    scheduling.served.publish("digits", 200, ["raw"])
    lease = scheduling.take()
    assert not scheduling.prune(200)
    scheduling.settle(lease)
    assert scheduling.prune(200)


def test_requested_version_is_not_pruned_for_ten_minutes(scheduling: Scheduling) -> None:
    asked = scheduling.request(100)
    held = scheduling.prune(100)
    scheduling.now += REQUEST_HOLD_S + 1
    pruned = scheduling.prune(100)
    scheduling.ask()
    found = scheduling.result(asked)

    assert (held, pruned) == (False, True)
    assert found is not None
    assert "pruned" in str(found.error)


def test_requested_version_comes_first_and_every_request_gets_the_result(
    scheduling: Scheduling,
) -> None:
    scheduling.served.publish("digits", 200, ["raw"])
    asked = scheduling.request(100)
    twice = scheduling.request(100)
    lease = scheduling.take()
    running = run(scheduling.validations.find("digits", asked.id))
    scheduling.settle(lease)

    assert asked.id == twice.id
    assert lease.subject.step == 100
    assert running is not None
    assert (running.leased_to, running.finding) == ("w", None)
    assert scheduling.result(asked) == GOOD


def test_version_with_metrics_is_evaluated_again_only_on_request(scheduling: Scheduling) -> None:
    scheduling.settle(scheduling.take())
    known = scheduling.request(100, possible=False)
    again = scheduling.request(100, again=True)
    once_more = scheduling.request(100)
    lease = scheduling.take()
    scheduling.settle(lease, Finding({"accuracy": 0.75}))
    newer = scheduling.result(again)

    assert (known.finding, once_more.finding) == (GOOD, GOOD)
    assert newer is not None
    assert newer.metrics == {"accuracy": 0.75}
    assert scheduling.ask() is None


def test_request_without_a_possible_worker_does_not_wait(scheduling: Scheduling) -> None:
    assert scheduling.request(100, possible=False) is None
    scheduling.settle(scheduling.take())
    assert scheduling.request(100, possible=False, task="robustness") is None


def test_worker_is_present_until_it_stops_asking(scheduling: Scheduling) -> None:
    scheduling.ask(averages=("raw",))
    subjects = [Subject("digits", name, "0" * 40, 100) for name in ("raw", "ema-0.9")]
    there = [scheduling.validations.has_worker(subject, "default") for subject in subjects]
    scheduling.now += 3600
    later = scheduling.validations.has_worker(subjects[0], "default")

    assert (there, later) == ([True, False], False)


def test_worker_that_names_a_version_gets_that_one_alone(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw"])
    older = scheduling.served.catalog.find("digits", "raw", "step-100")
    assert older is not None
    wanted: dict[str, Any] = {"averages": ("raw",), "version": older.id}
    lease = scheduling.take(**wanted)

    assert lease.subject == Subject("digits", "raw", older.id, 100)
    assert (scheduling.ask("other", **wanted), scheduling.held) == (None, 1)
    newer = scheduling.take("third")
    assert newer.subject.step == 200
    assert not scheduling.validations.has_worker(replace(newer.subject, version="0" * 40), "robustness")
    scheduling.settle(lease)
    assert (scheduling.ask("other", **wanted), scheduling.held) == (None, 0), "it has metrics"


@pytest.mark.parametrize("ending", ["error", "crashes"])
def test_version_that_failed_is_given_again_to_a_worker_that_names_it(scheduling: Scheduling, ending: str) -> None:
    version = scheduling.served.catalog.find("digits", "raw", "step-100")
    assert version is not None
    wanted: dict[str, Any] = {"averages": ("raw",), "version": version.id}
    if ending == "error":
        scheduling.settle(scheduling.take(), Finding(error="no data"))
    for _ in range(ATTEMPTS_MAX if ending == "crashes" else 0):
        scheduling.take()
        scheduling.now += 3600

    assert scheduling.take(**wanted).subject.version == version.id


def test_leases_and_requests_survive_a_restart(scheduling: Scheduling, tmp_path: Path) -> None:
    lease, asked = scheduling.take("first"), scheduling.request(100)
    with closing(MetricStore(scheduling.served.data / "metrics.sqlite")) as reopened:
        after = Scheduling(scheduling.served, reopened)
        held = after.prune(100)

        assert (after.ask("second"), held) == (None, False)
        assert after.settle(lease)
        assert after.result(asked) == GOOD


def test_leases_and_requests_are_moved_when_a_run_is_renamed(scheduling: Scheduling) -> None:
    lease, asked = scheduling.take(), scheduling.request(100)
    scheduling.served.catalog.move("digits", "digits.old", scheduling.served.data / "runs" / "digits.old")
    scheduling.settle(lease)

    moved = run(scheduling.validations.find("digits.old", asked.id))
    assert run(scheduling.validations.find("digits", asked.id)) is None
    assert moved is not None
    assert moved.finding == GOOD


def test_deleted_run_leaves_no_rows(scheduling: Scheduling) -> None:
    scheduling.served.publish("digits", 200, ["raw", "ema-0.9"])
    scheduling.settle(scheduling.take())
    scheduling.take()
    scheduling.request(200, again=True)
    scheduling.validations.delete("digits").result(WAIT_S)
    count = (
        "SELECT (SELECT COUNT(*) FROM reports), (SELECT COUNT(*) FROM leases), (SELECT COUNT(*) FROM validations),"
        " (SELECT COUNT(*) FROM scheduled)"
    )

    assert scheduling.served.metrics.submit(lambda db: db.execute(count).fetchone()).result(WAIT_S) == (0, 0, 0, 0)
