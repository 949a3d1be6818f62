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
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import REQUEST_HOLD_S, Validations
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served

GOOD = Finding({"accuracy": 0.5}, None, 10, 0.1)
Result = TypeVar("Result")


class Desk:
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
def desk(tmp_path: Path) -> Iterator[Desk]:
    served = Served(tmp_path / "data")
    served.publish("digits", 100, ["raw"])
    yield Desk(served, served.metrics)
    served.close()


def test_a_version_goes_to_one_worker_and_is_held_for_the_others(desk: Desk) -> None:
    lease = desk.take("first")

    assert (lease.subject.step, desk.held) == (100, 0)
    assert (desk.ask("second"), desk.held) == (None, 1)


def test_a_worker_for_all_runs_gets_no_run_without_a_trainer_since_the_start(desk: Desk) -> None:
    desk.served.show("digits", 100, ["raw"], RunState.FINISHED, is_current=False)
    assert desk.ask(run=None) is None
    desk.request(100)
    asked_for = desk.take(run=None)
    assert asked_for.subject.run == "digits"
    run(desk.validations.give_back(asked_for.id))
    assert desk.ask(run="digits") is not None


def test_heartbeats_keep_a_lease_and_without_them_the_next_worker_takes_it_over(desk: Desk) -> None:
    lease = desk.take("first")
    for _ in range(5):
        desk.now += 29
        assert run(desk.validations.beat(lease.id)) is not None
        assert desk.ask("second") is None
    desk.now += 31
    taken = desk.take("second")

    assert taken.subject == lease.subject
    assert run(desk.validations.beat(lease.id)) is None
    assert not desk.settle(lease)
    assert desk.settle(taken)


def test_a_late_result_counts_unless_another_worker_took_over(desk: Desk) -> None:
    lease = desk.take()
    desk.now += 1000

    assert desk.settle(lease)
    assert desk.ask() is None


def test_a_result_that_is_sent_twice_is_one_result(desk: Desk) -> None:
    lease = desk.take()
    first, again = (run(desk.validations.settle(lease.id, GOOD)) for _ in range(2))

    assert first is not None
    assert again is not None
    assert (first[1], again[1]) == (True, False)
    assert len(desk.served.metrics.reports("digits").result(WAIT_S)) == 1


def test_a_version_that_has_metrics_is_done_for_its_task_and_due_for_others(desk: Desk) -> None:
    desk.settle(desk.take())

    assert desk.ask("another") is None
    assert desk.take(task="robustness").task == "robustness"


def test_a_failed_version_goes_to_a_worker_that_has_not_failed_on_it(desk: Desk) -> None:
    lease = desk.take()
    desk.settle(lease, Finding(error="ValueError: no"))

    assert desk.ask(skip=(lease.subject.version,)) is None
    assert desk.ask("another") is not None


def test_a_returned_lease_is_free_at_once_and_no_attempt(desk: Desk) -> None:
    for _ in range(ATTEMPTS_MAX + 2):
        run(desk.validations.give_back(desk.take().id))

    assert desk.ask("another") is not None


def test_leases_of_a_dead_worker_are_free_at_once(desk: Desk) -> None:
    desk.take("server")
    desk.take("other", task="robustness")
    desk.validations.abandon("server")

    assert desk.take("next").subject.step == 100
    assert desk.ask("next", task="robustness") is None


def test_a_version_that_crashes_its_workers_is_reported_and_left_until_requested(
    desk: Desk,
) -> None:
    for number in range(ATTEMPTS_MAX):
        desk.take(f"w{number}")
        desk.now += 31

    assert desk.ask("next") is None
    rows = desk.served.metrics.reports("digits").result(WAIT_S)
    assert [row.worker for row in rows] == [f"w{ATTEMPTS_MAX - 1}"]
    assert "vanished" in str(rows[0].error)
    desk.request(100)
    assert desk.ask("next") is not None


def test_the_newest_version_of_each_average_of_each_run_is_due(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.served.publish("other", 7, ["raw"])
    found = [desk.take(run=None).subject for _ in range(3)]

    assert [(item.run, item.average, item.step) for item in found] == [
        ("digits", "raw", 200),
        ("digits", "ema-0.9", 200),
        ("other", "raw", 7),
    ]
    assert desk.ask(run=None) is None


def test_every_nth_version_is_due_and_the_last_one_of_a_finished_run(desk: Desk) -> None:
    found = []
    for step in range(100, 700, 100):
        if step > 100:
            desk.served.publish("digits", step, ["raw"])
        if (lease := desk.ask(every=3)) is not None:
            found.append(lease.subject.step)
            desk.settle(lease)
    desk.served.show("digits", 600, ["raw"], RunState.FINISHED)
    last = desk.take(every=3)

    assert found == [100, 400]
    assert last.subject.step == 600


def evaluate_while_publishing(desk: Desk, workers: int, until: float) -> list[tuple[float, str, int]]:
    """Publish three averages every 10 s and evaluate each version in about 6 s; returns time, average, step of results.

    Retention keeps three generations, as far as their versions are not held.
    """
    averages, start, results, step = ["raw", "ema-0.9", "ema-0.99"], desk.now, [], 100
    events: list[tuple[float, int, Lease | None]] = [(start + 0.1 * number, number, None) for number in range(workers)]
    next_publish = start
    while events:
        desk.now, number, lease = heapq.heappop(events)
        while next_publish <= desk.now and next_publish < start + until:
            step, next_publish = step + 100, next_publish + 10
            desk.served.publish("digits", step, averages)
            for old in desk.served.catalog.generations("digits")[3:]:
                desk.served.catalog.remove(old)
        if next_publish >= start + until:
            desk.served.show("digits", step, averages, RunState.FINISHED)
        if lease is not None:
            assert desk.settle(lease)
            results.append((desk.now, lease.subject.average, lease.subject.step))
        lease = desk.ask(f"w{number}")
        if lease is not None:
            heapq.heappush(events, (desk.now + 6 + 0.1 * number, number, lease))
        elif desk.now < start + until:
            heapq.heappush(events, (desk.now + 1, number, None))
    return results


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_averages_are_evaluated_equally_often_when_evaluation_is_slower_than_publishing(
    desk: Desk, workers: int
) -> None:
    results = evaluate_while_publishing(desk, workers, 300.0)

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


def test_a_step_that_was_begun_is_completed_before_the_newest_one_begins(desk: Desk) -> None:
    names = ["raw", "ema-0.9", "ema-0.99"]
    desk.served.publish("digits", 200, names)
    first = desk.take()
    desk.served.publish("digits", 300, names)
    desk.served.publish("digits", 400, names)
    desk.settle(first)
    rest = [desk.take("w2").subject, desk.take("w3").subject]
    newest = desk.take("w4").subject

    assert [(item.average, item.step) for item in (first.subject, *rest)] == [(name, 200) for name in names]
    assert (newest.average, newest.step) == ("raw", 400)


def test_requests_come_before_the_rest_of_a_step_and_do_not_begin_one(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.served.publish("digits", 300, ["raw", "ema-0.9"])
    begun = desk.take()
    desk.request(200)
    requested = desk.take("w2")
    for lease in (begun, requested):
        desk.settle(lease)
    desk.served.publish("digits", 400, ["raw", "ema-0.9"])
    after = [desk.take(f"w{number}").subject for number in range(3)]

    assert (begun.subject.step, requested.subject.step) == (300, 200)
    assert [(item.average, item.step) for item in after] == [("ema-0.9", 300), ("raw", 400), ("ema-0.9", 400)]


def test_the_rest_of_a_step_is_not_pruned_between_two_evaluations_but_once_leases_expire(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.settle(desk.take())
    between = desk.prune(200)
    desk.settle(desk.take())
    desk.now += 31

    assert (between, desk.prune(200)) == (False, True)


def test_the_rest_of_a_step_without_a_worker_is_pruned_and_not_offered(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.settle(desk.take())
    desk.now += 31
    assert desk.prune(200)
    desk.served.publish("digits", 300, ["raw"])

    assert desk.take().subject.step == 300


def test_a_version_that_fails_completes_its_step_for_every_worker(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw"])
    failed = desk.take()
    desk.settle(failed, Finding(error="ValueError: no"))
    desk.served.publish("digits", 300, ["raw"])

    assert desk.take("another").subject.step == 300


def test_a_step_that_was_begun_is_completed_after_a_restart(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.settle(desk.take())
    desk.served.publish("digits", 300, ["raw", "ema-0.9"])
    with closing(MetricStore(desk.served.data / "metrics.sqlite")) as reopened:
        restarted = Desk(desk.served, reopened)

        assert [restarted.take(name).subject.step for name in ("w1", "w2", "w3")] == [200, 300, 300]


def test_a_step_begun_by_a_worker_for_one_average_is_not_completed_by_it(desk: Desk) -> None:
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])
    desk.settle(desk.take(averages=("raw",)))
    desk.served.publish("digits", 300, ["raw", "ema-0.9"])

    assert desk.take(averages=("raw",)).subject.step == 300


def test_a_derived_version_does_not_wait_for_the_end_of_the_run(desk: Desk) -> None:
    folder = desk.served.data / "runs" / "digits" / "derived" / "00000001-000000000100"
    folder.mkdir(parents=True)
    base = desk.served.catalog.versions("digits", "raw")[0]
    desk.served.catalog.add_derived(
        replace(base, id="d" * 40, average="power-0.05", folder=folder, seq=1, derived="synthesized")
    )
    desk.served.publish("digits", 200, ["raw", "ema-0.9"])

    assert desk.take().subject.average == "power-0.05"
    assert desk.take("another").subject.step == 200


def test_runs_take_turns_when_a_worker_for_all_runs_is_slower_than_they_publish(desk: Desk) -> None:
    given = []
    for step in range(200, 1000, 100):
        for name in ("digits", "other"):
            desk.served.publish(name, step, ["raw", "ema-0.9"])
        lease = desk.take(run=None)
        given.append(lease.subject.run)
        desk.settle(lease)

    assert given == ["digits", "digits", "other", "other"] * 2


def test_a_lease_holds_its_version_against_pruning_until_it_ends_or_expires(desk: Desk) -> None:
    lease = desk.take()
    held = desk.prune(100)
    desk.now += 31
    expired = desk.prune(100)

    assert (held, expired) == (False, True)
    desk.served.publish("digits", 200, ["raw"])
    lease = desk.take()
    assert not desk.prune(200)
    desk.settle(lease)
    assert desk.prune(200)


def test_a_requested_version_is_held_for_ten_minutes(desk: Desk) -> None:
    asked = desk.request(100)
    held = desk.prune(100)
    desk.now += REQUEST_HOLD_S + 1
    pruned = desk.prune(100)
    desk.ask()
    found = desk.result(asked)

    assert (held, pruned) == (False, True)
    assert found is not None
    assert "pruned" in str(found.error)


def test_requested_versions_come_first_and_every_request_gets_the_result(
    desk: Desk,
) -> None:
    desk.served.publish("digits", 200, ["raw"])
    asked = desk.request(100)
    twice = desk.request(100)
    lease = desk.take()
    running = run(desk.validations.find("digits", asked.id))
    desk.settle(lease)

    assert asked.id == twice.id
    assert lease.subject.step == 100
    assert running is not None
    assert (running.leased_to, running.finding) == ("w", None)
    assert desk.result(asked) == GOOD


def test_a_version_with_metrics_is_evaluated_again_only_on_request(desk: Desk) -> None:
    desk.settle(desk.take())
    known = desk.request(100, possible=False)
    again = desk.request(100, again=True)
    once_more = desk.request(100)
    lease = desk.take()
    desk.settle(lease, Finding({"accuracy": 0.75}))
    newer = desk.result(again)

    assert (known.finding, once_more.finding) == (GOOD, GOOD)
    assert newer is not None
    assert newer.metrics == {"accuracy": 0.75}
    assert desk.ask() is None


def test_a_request_without_a_possible_worker_does_not_wait(desk: Desk) -> None:
    assert desk.request(100, possible=False) is None
    desk.settle(desk.take())
    assert desk.request(100, possible=False, task="robustness") is None


def test_a_worker_is_present_until_it_stops_asking(desk: Desk) -> None:
    desk.ask(averages=("raw",))
    there = [desk.validations.has_worker("digits", name, "default") for name in ("raw", "ema-0.9")]
    desk.now += 3600
    later = desk.validations.has_worker("digits", "raw", "default")

    assert (there, later) == ([True, False], False)


def test_leases_and_requests_outlive_the_server(desk: Desk, tmp_path: Path) -> None:
    lease, asked = desk.take("first"), desk.request(100)
    with closing(MetricStore(desk.served.data / "metrics.sqlite")) as reopened:
        after = Desk(desk.served, reopened)
        held = after.prune(100)

        assert (after.ask("second"), held) == (None, False)
        assert after.settle(lease)
        assert after.result(asked) == GOOD


def test_leases_and_requests_follow_a_run_to_its_new_name(desk: Desk) -> None:
    lease, asked = desk.take(), desk.request(100)
    desk.served.catalog.move("digits", "digits.old", desk.served.data / "runs" / "digits.old")
    desk.settle(lease)

    moved = run(desk.validations.find("digits.old", asked.id))
    assert run(desk.validations.find("digits", asked.id)) is None
    assert moved is not None
    assert moved.finding == GOOD
