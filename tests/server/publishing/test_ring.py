"""The ring keeps a bounded number of snapshots of power averages beyond their generations, all of one history."""

from __future__ import annotations

import logging
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Applied, Rewound
from ema_server.publishing.retention import thinned
from ema_server.publishing.ring import RingStatus
from ema_server.storage import disk
from ema_server.storage.catalog import Version
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core, versions_by_average

_POWERS = ("power:sigma_rel=0.05", "power:sigma_rel=0.1,name=wide", "raw")


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.rand(5000, generator=generator),
        "mean": torch.rand(3, generator=generator),
        "n": torch.tensor(step),
    }


_MANIFEST = manifest_of(_weights(1), roles={"mean": Role.BUFFER})


def _apply(core: ServerCore, *steps: int) -> None:
    for step in steps:
        assert isinstance(core.apply("r", step, _weights(step)), Applied)


def _publish(core: ServerCore, *steps: int) -> dict[str, Version]:
    """A generation at each of the steps; the versions of the last."""
    for step in steps:
        _apply(core, step)
        found = versions_by_average(core.publish("r"))
    return found


def _steps(core: ServerCore, run: str = "r") -> list[int]:
    return [snapshot.step for snapshot in core.ring.snapshots(run)]


def _status(core: ServerCore) -> RingStatus | None:
    core.ring.settle("r")
    return core.ring.status("r")


def test_snapshot_links_the_files_of_power_averages_and_outlives_them(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=1) as core:
        joined(core.join("r", _MANIFEST, _POWERS, config='{"a": 1}'))
        version = _publish(core, 1, 2)["wide"]
        snapshot = core.ring.snapshots("r")[-1]
        assert [member.average for member in snapshot.members] == ["power-0.05", "wide"]
        path = snapshot.folder / snapshot.members[1].file.name
        assert path.stat().st_ino == (version.folder / "model.safetensors").stat().st_ino
        weights = core.load(version)
        _publish(core, *range(3, 8))
        assert not version.folder.exists(), "retention goes on"

        assert {name: value.tolist() for name, value in load_file(path).items()} == {
            name: value.tolist() for name, value in weights.items()
        }
        member = snapshot.members[1]
        assert (member.version, member.origin, member.began, member.updates) == (version.id, 0, 1, 2)
        assert member.copied == {"n"}
        assert (snapshot.folder / "config.json").read_text() == '{"a": 1}'


def test_no_ring_without_power_averages_or_with_size_zero(tmp_path: Path) -> None:
    with running_core(tmp_path / "a") as core:
        joined(core.join("r", _MANIFEST))
        _publish(core, 1, 2)
        assert _status(core) is None
    with running_core(tmp_path / "b", ring_size=0) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1, 2)
        assert not core.data_dir.ring_folder("r").exists()


def test_full_ring_drops_the_snapshot_with_the_closest_neighbours() -> None:
    assert thinned([1, 5, 9], 3) == []
    assert thinned([10, 20, 30, 31, 40], 4) == [31]
    assert thinned([10, 20, 30, 40], 3) == [20], "of several the earliest"
    assert thinned([1, 2, 3, 100], 2) == [2, 3], "the first and the newest stay"


@pytest.mark.parametrize("size", [2, 5, 32])
def test_ring_stays_spread_over_the_run(size: int) -> None:
    ring: list[int] = []
    for step in range(10, 10_010, 10):
        ring.append(step)
        ring = [kept for kept in ring if kept not in thinned(ring, size)]

    gaps = [after - before for before, after in pairwise(ring)]
    assert (len(ring), ring[0], ring[-1]) == (size, 10, 10_000)
    assert max(gaps) <= 4 * 10_000 / size or size == 2


def test_ring_has_no_more_snapshots_than_its_size(tmp_path: Path) -> None:
    with running_core(tmp_path, ring_size=3) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, *range(1, 9))
        assert len(_steps(core)) == 3
        assert (_steps(core)[0], _steps(core)[-1]) == (1, 8)
        assert _status(core) == RingStatus(3, 1, 8, None)


def test_ring_is_not_thinned_out_while_it_is_read(tmp_path: Path) -> None:
    with running_core(tmp_path, ring_size=2) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        with core.ring.reading("r"):
            _publish(core, 1, 2, 3, 4)
            assert _steps(core) == [1, 2, 3, 4]
        _publish(core, 5)
        assert _steps(core) == [1, 5]


def test_ring_every_steps_makes_generations_due_and_skips_others(tmp_path: Path) -> None:
    with running_core(tmp_path, ring_every_steps=10) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        for step in range(1, 38):
            _apply(core, step)
            core.settled("r", lambda status: (status.published_step or 0) + 10 > (status.step or 0))
        assert _steps(core) == [10, 20, 30]
        durable(core.publish("r"))
        assert _steps(core) == [10, 20, 30], "step 37 is early"
        durable(core.finish("r"))
        assert _steps(core) == [10, 20, 30, 37], "the last one of a run is always kept"


def test_ring_every_steps_ignores_runs_without_power_averages(tmp_path: Path) -> None:
    with running_core(tmp_path, ring_every_steps=2) as core:
        joined(core.join("r", _MANIFEST))
        _apply(core, *range(1, 8))
        core.settled("r", lambda status: status.step == 7)
        assert core.announced == []


def test_bfloat16_halves_averages_but_not_copied_tensors(tmp_path: Path) -> None:
    with running_core(tmp_path, ring_dtype="bfloat16") as core:
        joined(core.join("r", _MANIFEST, ["power:sigma_rel=0.05,buffers=copy"]))
        (version,) = _publish(core, 1, 2).values()
        snapshot = core.ring.snapshots("r")[-1]
        path = snapshot.folder / snapshot.members[0].file.name
        kept, exact = load_file(path), core.load(version)

        assert snapshot.dtype == "bfloat16"
        assert torch.equal(kept["w"], exact["w"].bfloat16())
        assert torch.equal(kept["mean"], exact["mean"])
        assert kept["n"].item() == 2
        assert snapshot.members[0].copied == {"mean", "n"}
        assert path.stat().st_size < 0.6 * (version.folder / "model.safetensors").stat().st_size


def test_bfloat16_keeps_frozen_tensors_whole_under_all_names(tmp_path: Path) -> None:
    weights = {"w": torch.full((50,), 0.1234567), "fixed": torch.full((3,), 0.520894885)}
    manifest = manifest_of(weights, roles={"fixed": Role.FROZEN}, aliases={"fixed": ("tied",)})
    with running_core(tmp_path, ring_dtype="bfloat16") as core:
        joined(core.join("r", manifest, ["power:sigma_rel=0.05"]))
        core.apply("r", 1, weights)
        durable(core.publish("r"))
        (snapshot,) = core.ring.snapshots("r")
        kept = load_file(snapshot.folder / snapshot.members[0].file.name)

    assert kept["w"].dtype == torch.bfloat16
    assert snapshot.members[0].copied == {"fixed", "tied"}
    assert torch.equal(kept["fixed"], weights["fixed"])
    assert torch.equal(kept["tied"], weights["fixed"])


def test_disk_error_stops_only_the_ring(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        core.data_dir.ring_folder("r").touch()
        with caplog.at_level(logging.INFO, "ema"):
            _publish(core, 1, 2)
        status = _status(core)
        assert status is not None
        assert status.error is not None
        assert status.error.startswith("step 2 could not be kept: ")
        errors = [r for r in caplog.records if "its ring for later synthesis stores no more snapshots" in r.message]
        assert len(errors) == 1, "logged once, not at every publication"
        assert core.statuses.get("r").published_step == 2  # type: ignore[union-attr]

        core.data_dir.ring_folder("r").unlink()
        _publish(core, 3)
        assert _status(core) == RingStatus(1, 3, 3, None)


def test_nearly_full_disk_is_left_to_the_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1)
        full = SimpleNamespace(free=50_000)
        monkeypatch.setattr(disk, "shutil", SimpleNamespace(disk_usage=lambda _: full))
        _publish(core, 2)
        status = _status(core)
        assert status is not None
        assert status.error is not None
        assert status.error.startswith("step 2 could not be kept: 50,000 bytes are free on the disk, ")
        assert (_steps(core), core.statuses.get("r").published_step) == ([1], 2)  # type: ignore[union-attr]
        full.free = 1 << 30
        _publish(core, 3)
        assert _status(core) == RingStatus(2, 1, 3, None)


def test_rewind_drops_later_snapshots_from_the_ring(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=9) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1, 2, 3, 4, 5)
        left = {snapshot.step: snapshot.members[0].version for snapshot in core.ring.snapshots("r")}
        assert isinstance(core.rewind("r", 3), Rewound)
        for step in (4, 5):
            core.apply("r", step, _weights(step + 100))
        durable(core.publish("r"))

        now = {snapshot.step: snapshot.members[0].version for snapshot in core.ring.snapshots("r")}
        assert sorted(now) == [1, 2, 3, 5]
        assert [left[step] == now[step] for step in (1, 2, 3, 5)] == [True, True, True, False]


def test_restart_keeps_the_ring_up_to_the_resumed_generation(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1, 2, 3)
        newest = core.catalog.generations("r")[0].folder
    (newest / "manifest.json").unlink()
    with running_core(tmp_path) as core:
        assert _status(core) == RingStatus(3, 1, 3, None)
        assert joined(core.join("r", _MANIFEST, _POWERS, first_step=4)).last_step == 2
        _publish(core, 4)
        assert _steps(core) == [1, 2, 4]


def test_undroppable_snapshots_are_never_mixed_with_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1, 2, 3)
        core.ring.settle("r")
        refused = threading.Event()

        def refuse(self: Path, target: Path) -> Path:
            refused.set()
            raise OSError(5, "Input/output error")

        folder = type(core.data_dir.ring_folder("r"))
        rename = folder.rename
        monkeypatch.setattr(
            folder, "rename", lambda self, to: refuse(self, to) if "ring" in self.parts else rename(self, to)
        )
        assert isinstance(core.rewind("r", 1), Rewound)
        _publish(core, 2)
        assert refused.wait(WAIT_S)
        assert _steps(core) == [1, 2, 3], "the old history alone"
        monkeypatch.undo()
        _publish(core, 4)
        assert _steps(core) == [1, 4]


def test_run_that_is_set_aside_keeps_its_ring(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _POWERS))
        _publish(core, 1, 2)
        joined(core.join("r", _MANIFEST, _POWERS, resume="never"))
        aside = next(run for run in core.catalog.runs() if run != "r")
        assert _steps(core, aside) == [1, 2]
        assert core.ring.status(aside) == RingStatus(2, 1, 2, None)
        assert _status(core) is None
        _publish(core, 1)
        assert _steps(core) == [1]
