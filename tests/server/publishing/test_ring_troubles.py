"""Disk errors, crashes and restarts stop or repair the ring of a run; averaging and publishing continue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_server.averager.jobs import Rewound
from ema_server.publishing import ring
from ema_server.publishing.ring_snapshot import write_snapshot
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core, versions_by_average

_FOLDER = type(Path())


def _weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.rand(50, generator=torch.Generator().manual_seed(seed))}


def _join(core: ServerCore, first_step: int = 1) -> None:
    joined(core.join("r", manifest_of(_weights(1)), ["power:sigma_rel=0.05"], first_step=first_step))


def _publish(core: ServerCore, *steps: int, seed: int = 0) -> None:
    for step in steps:
        core.apply("r", step, _weights(step + seed))
        durable(core.publish("r"))


def _steps(core: ServerCore) -> list[int]:
    return [snapshot.step for snapshot in core.ring.snapshots("r")]


def _refusing(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Make the operation fail for ring folders and their content."""
    works: Callable[..., Any] = getattr(_FOLDER, method)

    def refuse(self: Path, *arguments: Any) -> Any:
        if "ring" in self.parts:
            raise PermissionError(13, "Permission denied")
        return works(self, *arguments)

    monkeypatch.setattr(_FOLDER, method, refuse)


def _error(core: ServerCore) -> str:
    core.ring.settle("r")
    status = core.ring.status("r")
    assert status is not None
    assert status.error is not None
    return status.error


def test_unlistable_ring_stops_only_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _publish(core, 1, 2)
        core.ring.settle("r")
        with monkeypatch.context() as refusing:
            _refusing(refusing, "iterdir")
            _publish(core, 3)
            assert _error(core) == "step 3 could not be kept: Permission denied"
            assert isinstance(core.rewind("r", 1), Rewound)
            _publish(core, 2)
            assert "Permission denied" in _error(core)
            assert core.publisher.is_alive()
        _publish(core, 4)
        assert _steps(core) == [1, 4]


def test_restarted_server_replaces_an_unlistable_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _publish(core, 1)
    with monkeypatch.context() as refusing:
        _refusing(refusing, "iterdir")
        refusing.setattr("ema_server.storage.datadir.DataDir.sweep", lambda self: None)
        with running_core(tmp_path) as core:
            assert "Permission denied" in _error(core)
            _join(core, first_step=2)
            _publish(core, 2)


def test_restart_drops_what_could_not_be_dropped_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _publish(core, 1, 2, 3)
        core.ring.settle("r")
        with monkeypatch.context() as refusing:
            _refusing(refusing, "rename")
            assert isinstance(core.rewind("r", 1), Rewound)
            core.apply("r", 2, _weights(100))
            new = versions_by_average(core.publish("r"))["power-0.05"]
            assert _steps(core) == [1, 2, 3], "the old history alone"
    with running_core(tmp_path) as core:
        _join(core, first_step=3)
        _publish(core, 3, seed=100)
        kept = {snapshot.step: snapshot.members[0].version for snapshot in core.ring.snapshots("r")}

    assert sorted(kept) == [1, 2, 3]
    assert kept[2] == new.id
    assert not (tmp_path / "runs/r/ring.cut").exists()


def test_damaged_cut_file_drops_the_ring(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _publish(core, 1, 2)
    (tmp_path / "runs/r/ring.cut").write_bytes(b"\0\0")
    with running_core(tmp_path) as core:
        _join(core, first_step=3)
        _publish(core, 3)
        assert _steps(core) == [2, 3], "the newest generation, and what came after it"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Snapshots of step 2 are written once this is set."""
    go_on = threading.Event()

    def write(folder: Path, generation: Any, dtype: Any) -> None:
        assert generation.step != 2 or go_on.wait(WAIT_S)
        write_snapshot(folder, generation, dtype)

    monkeypatch.setattr(ring, "write_snapshot", write)
    yield go_on
    go_on.set()


def test_ring_readers_wait_for_it_and_publishing_does_not(tmp_path: Path, slow: threading.Event) -> None:
    with ThreadPoolExecutor(1) as pool, running_core(tmp_path) as core:
        _join(core)
        _publish(core, 1, 2)
        assert core.statuses.get("r").published_step == 2  # type: ignore[union-attr]
        assert not (tmp_path / "runs/r/ring").joinpath("00000002-000000000002").exists()
        reading = pool.submit(_steps, core)
        assert not reading.done()
        slow.set()
        assert reading.result(WAIT_S) == [1, 2]


def test_snapshot_missed_by_a_crash_is_added_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path, ring_every_steps=10) as core:
        _join(core)
        _publish(core, 1)
        core.ring.settle("r")
        monkeypatch.setattr(core.ring, "keep", lambda generation: None)
        core.apply("r", 2, _weights(2))
        durable(core.finish("r"))
        assert _steps(core) == [1]
    with running_core(tmp_path, ring_every_steps=10) as core:
        assert _steps(core) == [1, 2]
