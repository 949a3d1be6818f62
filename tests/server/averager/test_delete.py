"""A run is deleted with everything that belongs to it, unless a trainer streams it."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_proto.averages.rules import PowerEma
from ema_proto.averages.specs import parse_average
from ema_server.averager.jobs import Deleted, Unchanged, WhyNot
from ema_server.evaluation import lease_queries
from ema_server.evaluation.metric_store import Report, Subject
from ema_server.runs.status_store import RunState
from ema_server.storage.catalog import Version
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core
from support.waiting import eventually

_AVERAGES = ("raw", "power:sigma_rel=0.05", "power:sigma_rel=0.1")


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((100,), float(step))}


_MANIFEST = manifest_of(_weights(1))


def _begin(core: ServerCore, run: str = "r") -> tuple[Version, ...]:
    """A streaming run with three generations, of which the newest one's versions are returned."""
    joined(core.join(run, _MANIFEST, _AVERAGES))
    for step in (1, 2, 3):
        core.apply(run, step, _weights(step))
        published = durable(core.publish(run))
    return published.versions


def _measure(core: ServerCore, version: Version) -> None:
    subject = Subject(version.run, version.average, version.id, version.step)
    core.server.services.metrics.hand_out(subject)
    report = Report(subject, "default", "w", {"loss": 1.0}, None, None, None, "2026-01-01T00:00:00Z")
    core.server.services.metrics.add(report).result(WAIT_S)


def _reports(core: ServerCore, run: str = "r") -> int:
    return len(core.server.services.metrics.reports(run).result(WAIT_S))


def _erased(core: ServerCore) -> None:
    """Wait until no deleted run is left on the disk."""
    eventually(lambda: not core.data_dir.deleted(), "the files of deleted runs are erased", WAIT_S)


@contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_deleted_run_leaves_nothing(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        version = _begin(core)[0]
        other = _begin(core, "other")[0]
        durable(core.finish("r"))
        rule = parse_average("power:sigma_rel=0.07,name=made")
        assert isinstance(rule, PowerEma)
        core.server.services.deriving.synthesize("r", rule, 3)
        for each in (version, other):
            _measure(core, each)

        assert core.delete("r") == Deleted()

        assert core.statuses.get("r") is None
        assert core.statuses.deleted_at("r") is not None
        assert core.catalog.runs() == ("other",)
        assert (core.catalog.generations("r"), core.catalog.derived("r")) == ((), ())
        assert core.ring.status("r") is None
        assert (_reports(core), _reports(core, "other")) == (0, 1)
        _erased(core)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
        assert core.delete("r") == Unchanged(WhyNot.NO_SUCH_RUN, "run 'r' does not exist")
    with running_core(tmp_path) as core:
        assert [status.run for status in core.statuses.all()] == ["other"]


def test_a_new_run_of_the_name_of_a_deleted_one_begins_without_its_metrics(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _measure(core, _begin(core)[0])
        durable(core.finish("r"))
        core.delete("r")

        answer = joined(core.join("r", _MANIFEST, _AVERAGES))

        assert (answer.continuation, answer.last_step, _reports(core)) == ("new", None, 0)
        core.apply("r", 1, _weights(1))
        durable(core.publish("r"))
        assert [generation.step for generation in core.catalog.generations("r")] == [1]
        assert core.statuses.deleted_at("r") is None
        _erased(core)
        assert core.data_dir.runs() == ("r",)


def test_a_run_is_not_deleted_while_it_is_streamed(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)

        answer = core.delete("r")

        assert isinstance(answer, Unchanged)
        assert answer.why is WhyNot.STREAMING
        assert "being streamed: end its trainer first" in answer.text
        core.apply("r", 4, _weights(4))
        assert durable(core.publish("r")).step == 4


@pytest.mark.parametrize("lost", [True, False])
def test_a_run_whose_trainer_has_gone_is_deleted_once_its_last_generation_is_written(
    tmp_path: Path, lost: bool
) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        core.apply("r", 4, _weights(4))
        core.leave("r", lost=lost)

        assert core.delete("r") == Deleted()

        _erased(core)
        assert core.data_dir.runs() == ()
        assert core.averager.is_alive()
        assert core.telemetry.registry.get_sample_value("ema_internal_errors_total") == 0


def test_a_run_that_cannot_be_published_can_be_deleted(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        core.apply("r", 4, _weights(4))
        with _largest_file(100):
            core.leave("r")
            core.settled("r", lambda status: status.publish_error is not None)
            assert core.delete("r") == Deleted()
        assert core.statuses.get("r") is None


def test_a_run_on_disk_alone_is_deleted(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
    with running_core(tmp_path) as core:
        status = core.statuses.get("r")
        assert status is not None
        assert status.state is RunState.WAITING
        assert core.delete("r") == Deleted()
        _erased(core)
        assert core.data_dir.runs() == ()


def test_a_deletion_that_a_crash_interrupted_is_completed_at_the_next_start(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _measure(core, _begin(core)[0])
    with running_core(tmp_path) as core:
        core.data_dir.set_deleted("r")
        assert _reports(core) == 1
    with running_core(tmp_path) as core:
        _erased(core)
        assert _reports(core) == 0
        assert core.statuses.all() == ()


def test_metrics_of_a_newer_run_survive_the_completion_of_an_older_deletion(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        durable(core.finish("r"))
        core.settled("r", lambda status: status.memory_bytes == 0)
        core.data_dir.set_deleted("r")
        core.catalog.delete("r")
        _measure(core, _begin(core)[0])
    with running_core(tmp_path) as core:
        _erased(core)
        assert _reports(core) == 1


def test_where_metrics_cannot_be_deleted_the_space_is_freed_and_the_next_start_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with running_core(tmp_path) as core:
        _measure(core, _begin(core)[0])
        durable(core.finish("r"))
        with monkeypatch.context() as patched:
            patched.setattr(lease_queries, "delete_run", full)
            assert core.delete("r") == Deleted()
            ((name, folder),) = core.data_dir.deleted()
            eventually(lambda: not list(folder.iterdir()), "the files are erased", WAIT_S)
        assert (name, _reports(core)) == ("r", 1)
    with running_core(tmp_path) as core:
        _erased(core)
        assert _reports(core) == 0
