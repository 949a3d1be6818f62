"""The evaluation worker: every new version once, despite failing functions, an absent server, and retention."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from ema_reader import LeaseLost, NotFound, Reader, WaitTimeout
from ema_reader.errors import UsageError
from ema_reader.evaluation.batchnorm import recalibrating
from ema_reader.evaluation.user_function import Measured, check_device, import_function, measured
from ema_reader.evaluation.worker import EvaluationWorker, Outcome, evaluate_version
from ema_reader.leases import Wanted
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served, weights
from support.waiting import eventually

AVERAGES = ["ema-0.9", "raw"]


def bias(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """A metric whose value is the step that was evaluated."""
    return {"bias": float(state["bias"][0])}


def worker(reader: Reader, function: Callable[..., Mapping[str, Any]] = bias, **settings: Any) -> EvaluationWorker:
    return EvaluationWorker(reader, function, "digits", poll_s=0.02, **settings)


def finish(served: Served, step: int) -> None:
    served.show("digits", step, AVERAGES, RunState.FINISHED)


def in_thread(work: EvaluationWorker) -> tuple[threading.Thread, list[Outcome]]:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(work.outcomes()), daemon=True)
    thread.start()
    return thread, found


@pytest.fixture
def finished(served: Served) -> Served:
    served.publish("digits", 100, AVERAGES)
    served.publish("digits", 200, AVERAGES)
    finish(served, 200)
    return served


def test_last_version_of_each_average_of_a_finished_run_is_evaluated_and_reported(
    finished: Served, reader: Reader
) -> None:
    outcomes = list(worker(reader).outcomes())

    rows = reader.metrics("digits")
    assert [(o.version.average, o.version.step, o.metrics) for o in outcomes] == [
        ("ema-0.9", 200, {"bias": 200.0}),
        ("raw", 200, {"bias": 200.0}),
    ]
    assert [(row.average, row.metrics) for row in rows] == [("ema-0.9", {"bias": 200.0}), ("raw", {"bias": 200.0})]


def test_only_requested_averages_are_evaluated_and_an_unknown_name_lists_the_known_ones(
    finished: Served, reader: Reader
) -> None:
    assert [o.version.average for o in worker(reader, averages=("raw",)).outcomes()] == ["raw"]
    with pytest.raises(NotFound, match=r"ema-0\.9, raw"):
        list(worker(reader, averages=("ema-0.99",)).outcomes())


def test_newest_version_is_evaluated_once_and_the_last_one_always(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, AVERAGES)
    thread, found = in_thread(worker(reader))
    eventually(lambda: len(found) == 2, "2 results")
    time.sleep(0.1)
    served.publish("digits", 200, AVERAGES)
    eventually(lambda: len(found) == 4, "4 results")
    served.publish("digits", 300, AVERAGES)
    finish(served, 300)
    thread.join(WAIT_S)

    assert sorted(o.version.step for o in found) == [100, 100, 200, 200, 300, 300]


@pytest.mark.parametrize("workers", [1, 3])
def test_slow_evaluation_gives_every_average_the_same_number_of_results(
    served: Served, reader: Reader, workers: int
) -> None:
    names = ["raw", "ema-0.9", "ema-0.99"]

    def slow(state: dict[str, torch.Tensor]) -> dict[str, float]:
        time.sleep(0.3)
        return bias(state)

    served.publish("digits", 100, names)
    threads = [in_thread(worker(reader, slow, worker=f"w{number}")) for number in range(workers)]
    for step in range(200, 1200, 100):
        time.sleep(0.1)
        served.publish("digits", step, names)
        for old in served.catalog.generations("digits")[2:]:
            served.catalog.remove(old)
    served.show("digits", step, names, RunState.FINISHED)
    for thread, _ in threads:
        thread.join(WAIT_S)

    rows = reader.metrics("digits")
    by_step = Counter(row.step for row in rows)
    assert set(Counter(row.average for row in rows).values()) == {len(by_step)}
    assert set(by_step.values()) == {3}, "each step that was evaluated is complete"
    assert max(by_step) == step
    assert len(by_step) < step // 100, "some steps were skipped: evaluation was slower than publishing"


def test_worker_waits_for_a_run_that_has_not_begun(served: Served, reader: Reader) -> None:
    thread, found = in_thread(worker(reader))
    time.sleep(0.1)
    was_waiting = thread.is_alive()
    served.publish("digits", 100, AVERAGES)
    finish(served, 100)
    thread.join(WAIT_S)

    assert was_waiting
    assert len(found) == 2


def test_error_of_the_function_is_reported_and_the_worker_continues(served: Served, reader: Reader) -> None:
    def fails_at_100(state: dict[str, torch.Tensor]) -> dict[str, float]:
        if state["bias"][0] == 100:
            raise RuntimeError("out of cheese")
        return bias(state)

    served.publish("digits", 100, ["raw"])
    work = worker(reader, fails_at_100)
    thread, found = in_thread(work)
    eventually(lambda: len(found) == 1, "1 results")
    served.publish("digits", 200, ["raw"])
    served.show("digits", 200, ["raw"], RunState.FINISHED)
    thread.join(WAIT_S)

    rows = [(row.step, row.metrics, row.error) for row in reader.metrics("digits")]
    assert rows == [(100, {}, "RuntimeError: out of cheese"), (200, {"bias": 200.0}, None)]
    assert work.failures == ()


def test_error_of_the_loader_is_reported_with_its_name(finished: Served, reader: Reader) -> None:
    def loader() -> tuple[torch.nn.Module, list[torch.Tensor]]:
        raise FileNotFoundError("no such data set")

    work = worker(reader, recalibrating(bias, "my_data:calibration", loader), averages=("raw",))
    list(work.outcomes())

    errors = [row.error for row in reader.metrics("digits")]
    assert errors == ["RecalibrationFailed: my_data:calibration: FileNotFoundError: no such data set"]


def test_error_without_a_text_is_reported_with_its_line(finished: Served, reader: Reader) -> None:
    def fails(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
        if not state.keys() & {"head"}:
            raise AssertionError
        return {}

    list(worker(reader, fails, averages=("raw",)).outcomes())

    (row,) = reader.metrics("digits")
    assert row.error is not None
    assert row.error.startswith("AssertionError: raise AssertionError (test_worker.py, line ")


def test_last_version_that_could_not_be_evaluated_is_a_failure(finished: Served, reader: Reader) -> None:
    def never(state: dict[str, torch.Tensor]) -> dict[str, float]:
        raise KeyError("weight")

    work = worker(reader, never)
    list(work.outcomes())

    assert [o.version.average for o in work.failures] == AVERAGES


def test_restarted_worker_skips_versions_with_metrics_and_retries_failures(finished: Served, reader: Reader) -> None:
    newest = {version.average: version for name in AVERAGES for version in reader.versions("digits", name)[:1]}
    reader.report(newest["raw"], {"bias": 200.0})
    reader.report(newest["ema-0.9"], error="it crashed")

    outcomes = list(worker(reader).outcomes())

    assert [o.version.average for o in outcomes] == ["ema-0.9"]


def test_version_pruned_before_it_is_loaded_is_skipped(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"])

    class Overtaken(Reader):
        """Retention deletes the version before it is loaded."""

        def load(self, version: Any, device: str = "cpu", **others: Any) -> dict[str, torch.Tensor]:
            if version.step == 100 and served.catalog.generations("digits")[-1].step == 100:
                served.publish("digits", 200, ["raw"])
                served.catalog.remove(served.catalog.generations("digits")[-1], force=True)
                served.show("digits", 200, ["raw"], RunState.FINISHED)
            return super().load(version, device)

    with Overtaken(reader.url) as overtaken:
        outcomes = list(worker(overtaken).outcomes())

    assert [o.version.step for o in outcomes] == [200]


def test_worker_waits_for_an_absent_server_and_logs_it_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.publish("digits", 100, ["raw"])
    with served.listening() as url:
        reader = Reader(url)
        thread, found = in_thread(worker(reader))
        eventually(lambda: len(found) == 1, "1 results")
    eventually(lambda: "waiting for it" in caplog.text, "the worker waits for the server")
    with served.listening(int(url.rsplit(":", 1)[1])):
        served.publish("digits", 200, ["raw"])
        served.show("digits", 200, ["raw"], RunState.FINISHED)
        thread.join(WAIT_S)
    reader.close()

    assert [o.version.step for o in found] == [100, 200]
    assert caplog.text.count("waiting for it") == 1


@pytest.mark.parametrize(
    "result",
    [None, {}, 0.5, [("a", 1)], {"a": None}, {"a": "good"}, {"a": torch.zeros(2)}, {1: 1.0}],
)
def test_result_that_is_no_dict_with_a_number_is_refused(result: object) -> None:
    with pytest.raises(ValueError, match=r"returned|metric"):
        measured(result)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "nan"),
        (torch.tensor(float("inf")), "inf"),
        (-float("inf"), "-inf"),
        (None, "NoneType 'None', not a number"),
        ([0.5, 0.6], "list '[0.5, 0.6]', not a number"),
        (torch.ones(2), "Tensor 'tensor([1., 1.])', not a number"),
        (10**400, None),
    ],
)
def test_metric_without_a_finite_value_is_missing_and_the_others_count(value: object, reason: str | None) -> None:
    found = measured({"top1": 0.9, "loss": value, "samples": 5})

    assert (found.metrics, found.samples) == ({"top1": 0.9}, 5)
    assert list(found.missing) == ["loss"]
    assert reason in (None, found.missing["loss"])


@pytest.mark.parametrize(
    ("name", "stored", "reason"),
    [
        ("x" * 201, "x" * 197 + "...", "its name has 201 characters, of which 200 are allowed"),
        ("", "(no name)", "its name is empty"),
        ("top\ud800", r"top\ud800", "its name is not valid Unicode"),
    ],
)
def test_metric_whose_name_cannot_be_stored_is_missing_and_the_others_count(
    finished: Served, reader: Reader, name: str, stored: str, reason: str
) -> None:
    list(worker(reader, lambda state: {name: 0.5, **bias(state)}, averages=("raw",)).outcomes())

    rows = reader.metrics("digits")
    assert [(row.metrics, row.missing, row.error) for row in rows] == [({"bias": 200.0}, {stored: reason}, None)]


def test_first_thousand_metrics_of_a_version_count(finished: Served, reader: Reader) -> None:
    many = {f"class-{number}": float(number) for number in range(1200)}
    list(worker(reader, lambda state: {**many, "samples": 3}, averages=("raw",)).outcomes())

    (row,) = reader.metrics("digits")
    assert row.metrics == {name: value for name, value in many.items() if value < 1000}
    assert row.missing == {"(other metrics)": "more than 1000 metrics: the first ones count"}


def test_one_version_is_evaluated_under_a_lease_and_not_twice(finished: Served, reader: Reader) -> None:
    finished.publish("digits", 300, ["raw"])
    older, held = reader.version("digits", "raw", "step-200"), []

    def look(state: dict[str, torch.Tensor]) -> dict[str, float]:
        held.append(reader.leases.ask(Wanted("other", "default", "digits", ("raw",), version=older.id)))
        return bias(state)

    outcome = evaluate_version(reader, older, look, "default", "cpu", set())
    again = evaluate_version(reader, older, look, "default", "cpu", set())

    assert outcome is not None
    assert (outcome.version, outcome.metrics) == (older, {"bias": 200.0})
    assert (held, again) == ([(None, 1)], None)
    assert [row.step for row in reader.metrics("digits")] == [200]


def test_one_version_that_another_worker_evaluates_is_waited_for(
    finished: Served, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ema_reader")
    version = reader.version("digits", "raw")
    lease, _ = reader.leases.ask(Wanted("other", "default", "digits", ("raw",)))
    assert lease is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(evaluate_version, reader, version, bias, "default", "cpu", set(), 0.02)
        eventually(lambda: "is being evaluated by another worker" in caplog.text, "it waits")
        reader.leases.settle(lease, {"bias": 1.0}, error=None, samples=None, seconds=0.1)
        assert waiting.result(WAIT_S) is None
    assert [(row.worker, row.metrics) for row in reader.metrics("digits")] == [("other", {"bias": 1.0})]


def test_one_version_whose_evaluation_failed_is_evaluated_again(finished: Served, reader: Reader) -> None:
    version = reader.version("digits", "raw")
    reader.report(version, worker="other", error="no data")
    outcome = evaluate_version(reader, version, bias, "default", "cpu", set())

    assert outcome is not None
    assert outcome.metrics == {"bias": 200.0}


def test_one_version_that_was_deleted_is_not_found(finished: Served, reader: Reader) -> None:
    version = replace(reader.version("digits", "raw"), id="0" * 40)
    with pytest.raises(NotFound, match="has no version"):
        evaluate_version(reader, version, bias, "default", "cpu", set())


def test_result_of_nan_alone_is_no_error() -> None:
    assert measured({"loss": float("nan")}) == Measured({}, None, {"loss": "nan"})
    assert measured({"a": 1.0, "samples": float("nan")}) == Measured({"a": 1.0}, None, {"samples": "nan"})


def test_version_with_a_nan_metric_keeps_the_others_and_is_evaluated_once(finished: Served, reader: Reader) -> None:
    def partly(state: dict[str, torch.Tensor]) -> dict[str, float]:
        return {**bias(state), "loss": float("nan")}

    work = worker(reader, partly)
    outcomes = list(work.outcomes())
    again = list(worker(reader, partly).outcomes())
    validated = reader.validate("digits", "raw")

    assert [(o.metrics, o.missing, o.error) for o in outcomes] == [({"bias": 200.0}, {"loss": "nan"}, None)] * 2
    assert (work.failures, again) == ((), [])
    assert [(row.metrics, row.missing) for row in reader.metrics("digits")] == [({"bias": 200.0}, {"loss": "nan"})] * 2
    assert (validated.state, validated.metrics, validated.missing) == ("done", {"bias": 200.0}, {"loss": "nan"})


def test_numbers_of_torch_are_converted_to_floats() -> None:
    metrics = measured({"a": torch.tensor(0.5), "b": 1, "c": True}).metrics

    assert metrics == {"a": 0.5, "b": 1.0, "c": 1.0}
    assert all(type(value) is float for value in metrics.values())


def test_number_of_samples_is_no_metric() -> None:
    assert measured({"accuracy": 0.5, "samples": 360}) == Measured({"accuracy": 0.5}, 360)
    assert measured({"accuracy": 0.5}) == Measured({"accuracy": 0.5}, None)


@pytest.mark.parametrize("result", [{"samples": 3}, {"a": 1.0, "samples": -1}, {"a": 1.0, "samples": 0.5}])
def test_invalid_number_of_samples_is_refused(result: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        measured(result)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x"])
def test_device_that_cannot_be_used_is_a_usage_error_that_names_it(device: str) -> None:
    check_device("cpu")
    with pytest.raises(UsageError, match=device):
        check_device(device)


def test_number_of_samples_is_reported(finished: Served, reader: Reader) -> None:
    list(worker(reader, lambda state: {**bias(state), "samples": 12}, averages=("raw",)).outcomes())

    found = reader.validate("digits", "raw")
    assert (found.state, found.samples, found.metrics) == ("done", 12, {"bias": 200.0})


def test_two_workers_never_evaluate_the_same_version(served: Served, reader: Reader) -> None:
    served.publish("digits", 200, [f"ema-0.{digit}" for digit in range(1, 9)])
    served.show("digits", 200, [f"ema-0.{digit}" for digit in range(1, 9)], RunState.FINISHED)
    threads = [in_thread(worker(reader, worker=name)) for name in ("a", "b", "c")]
    for thread, _ in threads:
        thread.join(WAIT_S)

    averages = [o.version.average for _, found in threads for o in found]
    assert sorted(averages) == [f"ema-0.{digit}" for digit in range(1, 9)]


def test_worker_without_a_run_takes_versions_of_all_runs(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"])
    served.publish("other", 7, ["raw"])
    outcomes = EvaluationWorker(reader, bias, poll_s=0.02).outcomes()

    assert {next(outcomes).version.run for _ in range(2)} == {"digits", "other"}


def test_timeout_of_a_validation_reports_its_state(served: Served, reader: Reader) -> None:
    served.publish("digits", 100, ["raw"])
    wanted = Wanted("w", "default", "digits", ())
    lease, _ = reader.leases.ask(wanted)
    with pytest.raises(WaitTimeout, match="running"):
        reader.validate("digits", "raw", timeout_s=1)
    assert lease is not None
    reader.leases.give_back(lease)

    with pytest.raises(LeaseLost):
        reader.leases.settle(replace(lease, id="nope"), {"a": 1.0}, error=None, samples=None, seconds=0.0)


def test_long_evaluation_keeps_its_lease(finished: Served, reader: Reader) -> None:
    held = []

    def long(state: dict[str, torch.Tensor]) -> dict[str, float]:
        time.sleep(1.5)
        held.append(reader.leases.ask(Wanted("other", "default", "digits", ("raw",))))
        return bias(state)

    outcomes = list(worker(reader, long, averages=("raw",), lease_s=1.0).outcomes())

    assert held == [(None, 1)]
    assert [o.error for o in outcomes] == [None]


@pytest.mark.parametrize(
    "target", ["module", ":f", "module:", "no_such_module_here:f", "json:no_such_function", "json:__name__", "a b:c"]
)
def test_function_that_cannot_be_imported_is_a_usage_error(target: str) -> None:
    with pytest.raises(UsageError):
        import_function(target)


def test_function_gets_the_weights_unchanged(finished: Served, reader: Reader) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(state: dict[str, torch.Tensor]) -> dict[str, float]:
        seen.append(state)
        return {"x": 1.0}

    list(worker(reader, look, averages=("raw",)).outcomes())

    expected = weights("raw", 200, 8)
    assert all(torch.equal(seen[0][name], expected[name]) for name in expected)


def test_a_failing_function_is_logged_with_one_traceback_per_kind_of_error(
    finished: Served, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: dict[str, torch.Tensor]) -> dict[str, float]:
        raise ValueError("no data\nin line 3")

    outcomes = list(worker(reader, fails).outcomes())

    logged = [record for record in caplog.records if "failed: ValueError: no data" in record.getMessage()]
    assert len(outcomes) == len(logged) == 2
    assert [bool(record.exc_info) for record in logged] == [True, False]
    assert all(len(record.getMessage().splitlines()) == 1 for record in logged)


def test_waiting_for_a_missing_run_names_the_known_ones_once(
    finished: Served, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ema_reader")
    work = EvaluationWorker(reader, bias, "later", poll_s=0.02)
    thread = threading.Thread(target=lambda: list(work.outcomes()), daemon=True)
    thread.start()
    eventually(lambda: "does not exist yet" in caplog.text, "the worker waits for the run")
    finished.publish("later", 100, AVERAGES)
    finished.show("later", 100, AVERAGES, RunState.FINISHED)
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert caplog.text.count("run 'later' does not exist yet; waiting for it (the runs are: digits)") == 1
