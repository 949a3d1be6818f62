"""What a ring is spared by: disks that refuse, crashes at a bad moment, and restarts. Averaging goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_server import ring
from ema_server.jobs import Rewound
from ema_server.ring_snapshot import write_snapshot
from support.keeper import WAIT_S, Keeper, durable, joined, keeping, manifest_of, versions_by_average

_FOLDER = type(Path())


def _weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.rand(50, generator=torch.Generator().manual_seed(seed))}


def _join(keeper: Keeper, first_step: int = 1) -> None:
    joined(keeper.join("r", manifest_of(_weights(1)), ["power:sigma_rel=0.05"], first_step=first_step))


def _publish(keeper: Keeper, *steps: int, seed: int = 0) -> None:
    for step in steps:
        keeper.apply("r", step, _weights(step + seed))
        durable(keeper.publish("r"))


def _steps(keeper: Keeper) -> list[int]:
    return [snapshot.step for snapshot in keeper.ring.snapshots("r")]


def _refusing(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Whatever lies in a ring, or is one, cannot be worked on so."""
    works: Callable[..., Any] = getattr(_FOLDER, method)

    def refuse(self: Path, *arguments: Any) -> Any:
        if "ring" in self.parts:
            raise PermissionError(13, "Permission denied")
        return works(self, *arguments)

    monkeypatch.setattr(_FOLDER, method, refuse)


def _error(keeper: Keeper) -> str:
    keeper.ring.settle("r")
    status = keeper.ring.status("r")
    assert status is not None
    assert status.error is not None
    return status.error


def test_a_ring_that_cannot_even_be_listed_stops_the_ring_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping(tmp_path) as keeper:
        _join(keeper)
        _publish(keeper, 1, 2)
        keeper.ring.settle("r")
        with monkeypatch.context() as refusing:
            _refusing(refusing, "iterdir")
            _publish(keeper, 3)
            assert _error(keeper) == "step 3 could not be kept: Permission denied"
            assert isinstance(keeper.rewind("r", 1), Rewound)
            _publish(keeper, 2)
            assert "Permission denied" in _error(keeper)
            assert keeper.publisher.is_alive()
        _publish(keeper, 4)
        assert _steps(keeper) == [1, 4]


def test_a_server_starts_over_a_ring_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with keeping(tmp_path) as keeper:
        _join(keeper)
        _publish(keeper, 1)
    with monkeypatch.context() as refusing:
        _refusing(refusing, "iterdir")
        refusing.setattr("ema_server.datadir.DataDir.sweep", lambda self: None)
        with keeping(tmp_path) as keeper:
            assert "Permission denied" in _error(keeper)
            _join(keeper, first_step=2)
            _publish(keeper, 2)


def test_a_restart_does_not_forget_what_could_not_be_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with keeping(tmp_path) as keeper:
        _join(keeper)
        _publish(keeper, 1, 2, 3)
        keeper.ring.settle("r")
        with monkeypatch.context() as refusing:
            _refusing(refusing, "rename")
            assert isinstance(keeper.rewind("r", 1), Rewound)
            keeper.apply("r", 2, _weights(100))
            new = versions_by_average(keeper.publish("r"))["power-0.05"]
            assert _steps(keeper) == [1, 2, 3], "the old history alone"
    with keeping(tmp_path) as keeper:
        _join(keeper, first_step=3)
        _publish(keeper, 3, seed=100)
        kept = {snapshot.step: snapshot.members[0].version for snapshot in keeper.ring.snapshots("r")}

    assert sorted(kept) == [1, 2, 3]
    assert kept[2] == new.id
    assert not (tmp_path / "runs/r/ring.cut").exists()


def test_a_note_of_what_could_not_be_dropped_that_is_damaged_costs_the_ring(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        _join(keeper)
        _publish(keeper, 1, 2)
    (tmp_path / "runs/r/ring.cut").write_bytes(b"\0\0")
    with keeping(tmp_path) as keeper:
        _join(keeper, first_step=3)
        _publish(keeper, 3)
        assert _steps(keeper) == [2, 3], "the newest generation, and what came after it"


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


def test_an_answer_does_not_wait_for_the_ring_and_who_reads_the_ring_does(
    tmp_path: Path, slow: threading.Event
) -> None:
    with ThreadPoolExecutor(1) as pool, keeping(tmp_path) as keeper:
        _join(keeper)
        _publish(keeper, 1, 2)
        assert keeper.board.get("r").published_step == 2  # type: ignore[union-attr]
        assert not (tmp_path / "runs/r/ring").joinpath("00000002-000000000002").exists()
        reading = pool.submit(_steps, keeper)
        assert not reading.done()
        slow.set()
        assert reading.result(WAIT_S) == [1, 2]


def test_what_a_crash_kept_from_the_ring_comes_in_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping(tmp_path, ring_every_steps=10) as keeper:
        _join(keeper)
        _publish(keeper, 1)
        keeper.ring.settle("r")
        monkeypatch.setattr(keeper.ring, "keep", lambda generation: None)
        keeper.apply("r", 2, _weights(2))
        durable(keeper.finish("r"))
        assert _steps(keeper) == [1]
    with keeping(tmp_path, ring_every_steps=10) as keeper:
        assert _steps(keeper) == [1, 2]
