"""An unexpected error in a job ends the session of one run; the thread and all other runs continue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_server.averager.jobs import Applied, Durable, Failed, NotInMemory, Publish, Quarantined, Refused, Unchanged
from ema_server.compute.pool import WorkerPool
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core, versions_by_average


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.sin(torch.arange(30.0) * step), "n": torch.tensor(step)}


_MANIFEST = manifest_of(_weights(1))


class _Defect(RuntimeError):
    """An error that no code of the server raises."""


def _raise(*_: Any, **__: Any) -> Any:
    raise _Defect("a defect")


def _errors(core: ServerCore) -> float:
    return core.telemetry.registry.get_sample_value("ema_internal_errors_total") or 0.0


def _is_named(text: str) -> bool:
    return "internal error" in text and "a defect" in text


_PLACES: dict[str, tuple[str, Callable[[ServerCore], object]]] = {
    "apply": ("ema_server.compute.pool.WorkerPool.update", lambda core: core.apply("r", 4, _weights(4))),
    "after apply": ("ema_server.averager.apply._track_nonfinite", lambda core: core.apply("r", 4, _weights(4))),
    "draft": ("ema_server.averager.active_run.GenerationWriter", lambda core: core.publish("r")),
    "pass of a draft": ("ema_server.compute.pool.WorkerPool.write", lambda core: core.publish("r")),
    "finish": ("ema_server.averager.active_run.GenerationWriter", lambda core: core.finish("r")),
    "rewind": ("ema_server.averager.rewind.carried_back", lambda core: core.rewind("r", 2)),
    "load of a rewind": ("ema_server.averager.active_runs.load_run", lambda core: core.rewind("r", 2)),
    "add": ("ema_server.averager.change.new_average", lambda core: core.add("r", "ema:0.5")),
    "remove": ("ema_server.runs.run.Run.mark_removed", lambda core: core.remove("r", "raw")),
    "join": ("ema_server.averager.join.decide", lambda core: core.join("r", _MANIFEST, first_step=5)),
}


@pytest.mark.parametrize("place", _PLACES)
def test_internal_error_fails_its_job_and_quarantines_only_its_run(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target, act = _PLACES[place]
    with running_core(tmp_path) as core:
        for run in ("r", "other"):
            joined(core.join(run, _MANIFEST))
            for step in (1, 2):
                core.apply(run, step, _weights(step))
            durable(core.publish(run))
            core.apply(run, 3, _weights(3))
        with monkeypatch.context() as broken:
            broken.setattr(target, _raise)
            answer = act(core)
        assert isinstance(answer, NotInMemory | Failed | Unchanged | Refused), answer
        assert _is_named(answer.text)
        assert _errors(core) == 1
        assert any(record.exc_info for record in caplog.records), "the traceback is in the log"
        status = core.settled("r", lambda status: status.memory_bytes == 0)
        assert status.quarantine is not None
        assert _is_named(status.quarantine.text)
        assert (status.step, status.published_step) == (2, 2), "nothing that may be half updated was published"
        refused = core.apply("r", 5, _weights(5))
        assert isinstance(refused, NotInMemory)
        assert "join it again" in refused.text

        assert isinstance(core.apply("other", 4, _weights(4)), Applied)
        assert joined(core.join("r", _MANIFEST, first_step=3, reconnect=True)).last_step == 2
        for step in (3, 4):
            assert isinstance(core.apply("r", step, _weights(step)), Applied)
        one, two = (versions_by_average(core.publish(run)) for run in ("r", "other"))
        for average in one:
            loaded, expected = core.load(one[average]), core.load(two[average])
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_internal_error_during_a_draft_answers_all_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Queue[Durable | Failed] = Queue()
    applied: Queue[Applied | Quarantined | NotInMemory] = Queue()
    entered, go_on = threading.Event(), threading.Event()

    def block(_: object) -> None:
        entered.set()
        go_on.wait(WAIT_S)

    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST))
        core.apply("r", 1, _weights(1))
        monkeypatch.setattr(WorkerPool, "update", _raise)
        core.averager.submit(Publish("no-such-run", "request", block))
        assert entered.wait(WAIT_S)
        for _ in range(2):
            core.averager.submit(Publish("r", "request", answers.put))
        core.averager.submit(core.apply_job("r", 2, _weights(2), applied.put))
        go_on.set()
        for _ in range(2):
            answer = answers.get(timeout=WAIT_S)
            assert isinstance(answer, Failed)
            assert _is_named(answer.text)
        assert isinstance(applied.get(timeout=WAIT_S), NotInMemory)
        assert list(core.data_dir.generations_folder("r").iterdir()) == []
        assert core.averager.is_alive()


def test_undeliverable_answer_harms_no_run(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST))
        core.averager.submit(core.apply_job("r", 1, _weights(1), _raise))
        assert isinstance(core.apply("r", 2, _weights(2)), Applied)
        assert durable(core.publish("r")).step == 2
        assert _errors(core) == 1


def test_internal_error_of_the_publisher_fails_only_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST))
        core.apply("r", 1, _weights(1))
        with monkeypatch.context() as broken:
            broken.setattr("ema_server.publishing.publisher.commit", _raise)
            answer = core.publish("r")
        assert isinstance(answer, Failed)
        assert _is_named(answer.text)
        assert list(core.data_dir.generations_folder("r").iterdir()) == []
        assert isinstance(core.apply("r", 2, _weights(2)), Applied)
        assert durable(core.publish("r")).step == 2
        assert _errors(core) == 1


def test_internal_error_while_a_run_is_freed_harms_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_core(tmp_path) as core:
        for run in ("r", "other"):
            joined(core.join(run, _MANIFEST))
            core.apply(run, 1, _weights(1))
            durable(core.publish(run))
        with monkeypatch.context() as broken:
            broken.setattr("ema_server.averager.active_runs.ActiveRuns.forget", _raise)
            core.leave("r")
            assert isinstance(core.apply("other", 2, _weights(2)), Applied)
            assert durable(core.publish("other")).step == 2, "which comes after the end of the session"
        assert _errors(core) == 1
        assert joined(core.join("r", _MANIFEST, first_step=2)).last_step == 1
