"""A pass that checks the snapshot gives the bits of one after a check, and changes nothing if it finds NaN or Inf."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_proto.wire.manifest import Role
from ema_server.averager.active_run import ActiveRun
from ema_server.averager.jobs import Applied, Durable, Joined, Publish, Quarantined, Refused
from ema_server.compute.device import Host
from ema_server.compute.memory import HostMemory, Memory
from ema_server.compute.pool import WorkerPool
from support.arithmetics import WITHOUT_NUMBA, check_in_the_pass
from support.server_core import WAIT_S, ServerCore, joined, manifest_of, running_core, versions_by_average

pytest.importorskip("numba", reason=WITHOUT_NUMBA)

_FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    floats = {name: torch.randn(501, generator=generator).to(dtype) for name, dtype in _FLOATS.items()}
    return {**floats, "running_mean": torch.randn(33, generator=generator), "n": torch.tensor(step)}


_MANIFEST = manifest_of(_weights(1), {"running_mean": Role.BUFFER})
_AVERAGES = [
    ["ema:0.9"],
    ["ema:0.9,acc=float64"],
    ["raw"],
    ["raw", "ema:0.3"],
    ["ema:0.9,buffers=copy", "swa"],
    ["ema:0.9,include=f*,name=some"],
    ["ema:0.9,update_after=3", "ema:0.5,acc=float64"],
]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each pass that checks has returned."""
    check_in_the_pass(monkeypatch)
    found: list[bool] = []
    move = WorkerPool.move

    def moved(*of: object) -> bool:
        found.append(move(*of))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(WorkerPool, "move", moved)
    return found


def _active(core: ServerCore) -> ActiveRun:
    active = core.averager._runs.get("r")
    assert active is not None
    return active


def _stream(data: Path, averages: list[str], *, checks_first: bool) -> dict[str, dict[str, Tensor]]:
    with running_core(data, checks_first=checks_first) as core:
        joined(core.join("r", _MANIFEST, averages))
        for step in (1, 2, 3, 5, 8, 9):
            assert isinstance(core.apply("r", step, _weights(step)), Applied)
        assert isinstance(core.apply("r", 9, _weights(10), mode="set"), Applied)
        assert isinstance(core.apply("r", 10, _weights(11)), Applied)
        return {name: core.load(version) for name, version in versions_by_average(core.publish("r")).items()}


@pytest.mark.parametrize("averages", _AVERAGES, ids=" ".join)
def test_pass_that_checks_gives_the_same_bits(tmp_path: Path, averages: list[str], passes: list[bool]) -> None:
    expected = _stream(tmp_path / "one", averages, checks_first=True)
    assert passes == []
    found = _stream(tmp_path / "other", averages, checks_first=False)

    assert passes == [True] * 8
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(found[name][key], value) for key, value in tensors.items()), name


@pytest.mark.parametrize("averages", _AVERAGES, ids=" ".join)
@pytest.mark.parametrize("name", _FLOATS)
def test_snapshot_with_nan_or_inf_changes_no_byte(
    tmp_path: Path, averages: list[str], name: str, passes: list[bool]
) -> None:
    with running_core(tmp_path, checks_first=False) as core:
        joined(core.join("r", _MANIFEST, averages))
        for step in (1, 2, 3, 4):
            core.apply("r", step, _weights(step))
        run = _active(core).run
        before = [average.memory.data.clone() for average in run.averages]
        ledgers = [average.record() for average in run.averages]
        for index, bad in enumerate((math.nan, math.inf, -math.inf)):
            dirty = {**_weights(5), name: _weights(5)[name].clone()}
            dirty[name][(0, 250, 500)[index]] = bad
            answer = core.apply("r", 5, dirty)

            assert isinstance(answer, Quarantined)
            assert answer.text == f"NaN or Inf at step 5 in 1 tensors: {name}"
            assert all(torch.equal(a.memory.data, b) for a, b in zip(run.averages, before, strict=True))
            assert [average.record() for average in run.averages] == ledgers
        assert passes == [True] * 4 + [False], "after a bad one, snapshots are checked first until one is clean"

        core.apply("r", 6, _weights(6))
        core.apply("r", 7, _weights(7))
        assert passes == [True] * 4 + [False, True]


def _wait(event: threading.Event) -> None:
    event.wait(WAIT_S)


@pytest.mark.parametrize("is_finite", [True, False])
def test_generation_that_a_pass_writes_is_the_state_before_it(
    tmp_path: Path, passes: list[bool], is_finite: bool
) -> None:
    """The next snapshot waits when the generation is begun: the pass over it writes the files."""
    with running_core(tmp_path, checks_first=False) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        core.apply("r", 1, _weights(1))
        core.apply("r", 2, _weights(2))
        release, answers = threading.Event(), queue.Queue[object]()
        core.averager.submit(Publish("no-such-run", "request", lambda _: _wait(release)))
        core.averager.submit(Publish("r", "request", answers.put))
        third = _weights(3) if is_finite else {**_weights(3), "bf16": torch.full((501,), math.nan).bfloat16()}
        core.averager.submit(core.apply_job("r", 3, third, answers.put))
        release.set()
        assert isinstance(answers.get(timeout=WAIT_S), Applied if is_finite else Quarantined)
        published = answers.get(timeout=WAIT_S)
        assert isinstance(published, Durable)
        assert (published.step, passes) == (2, [True, True, is_finite])

        (version,) = published.versions
        for name in ("f32", "bf16"):
            expected = 0.9 * _weights(1)[name].double() + 0.1 * _weights(2)[name].double()
            found = core.load(version)[name].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if name == "f32" else 0.02)


def test_spare_memory_is_freed_for_a_run_that_needs_it(
    tmp_path: Path, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_core(tmp_path, checks_first=False) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        core.apply("r", 1, _weights(1))
        (average,) = _active(core).run.averages
        with_spare, allocate = average.nbytes, Host.allocate
        assert average.spare is not None
        monkeypatch.setattr(Host, "allocate", _scarce(lambda: average.spare, allocate))

        assert isinstance(core.join("other", _MANIFEST, ["ema:0.9"]), Joined)
        assert average.nbytes == with_spare / 2
        assert isinstance(core.apply("r", 2, _weights(2)), Applied)
        assert passes == [True], "snapshots are checked before the pass again"
        monkeypatch.setattr(Host, "allocate", _scarce(lambda: average.memory, allocate))
        assert isinstance(core.join("third", _MANIFEST, ["ema:0.9"]), Refused)


def _scarce(
    holder: Callable[[], Memory | None], allocate: Callable[[Host, int], HostMemory]
) -> Callable[[Host, int], HostMemory]:
    """An `allocate` that has too little memory while `holder` returns some."""

    def allocated(host: Host, nbytes: int) -> HostMemory:
        if holder() is not None:
            raise MemoryError("only 0 are available")
        return allocate(host, nbytes)

    return allocated


def test_runs_with_more_averages_windows_or_little_memory_are_checked_first(
    tmp_path: Path, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, averages in enumerate((["ema:0.9", "ema:0.5", "raw"], ["window:2"], ["bema"])):
        with running_core(tmp_path / str(index), checks_first=False) as core:
            joined(core.join("r", _MANIFEST, averages))
            assert isinstance(core.apply("r", 1, _weights(1)), Applied)
            assert isinstance(core.apply("r", 2, _weights(2)), Applied)
    monkeypatch.setattr(Host, "spare", lambda *_: None)
    with running_core(tmp_path / "scarce", checks_first=False) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        assert isinstance(core.apply("r", 1, _weights(1)), Applied)

    assert passes == []
