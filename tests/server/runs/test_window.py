"""A window holds the last k snapshots of its cadence; one that stands for several steps counts for each."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Failed, Refused
from ema_server.rules.window import Entries, Entry, blends, entered, mean_age, restored, share_of
from support.oracle import EPS32
from support.processes import SUPPORT
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "single": torch.rand(70, generator=generator) * 8 - 4,
        "half": (torch.rand(33, generator=generator) * 8 - 4).bfloat16(),
        "statistic": torch.rand(5, generator=generator),
        "seen": torch.tensor(step),
    }


_MANIFEST = manifest_of(_weights(1), {"statistic": Role.BUFFER})


def _dense(steps: list[int], k: int, every: int, origin: int) -> list[int]:
    """The applied step whose weights each of the last k points had: a snapshot stands for all steps since the last."""
    inside: list[int] = []
    then = origin
    for now in steps:
        inside += [now for step in range(then + 1, now + 1) if step % every == 0]
        then = now
    return inside[-k:]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 20))
def test_window_entries_equal_those_of_a_dense_stream(strides: list[int], k: int, every: int, origin: int) -> None:
    entries: Entries = ()
    steps: list[int] = []
    now = origin
    for stride in strides:
        then, now = now, now + stride
        steps.append(now)
        entries = entered(entries, k, now, now // every - then // every)

        inside = _dense(steps, k, every, origin)
        assert [entry.step for entry in entries for _ in range(entry.count)] == inside
        slots = [entry.slot for entry in entries]
        assert len(set(slots)) == len(slots) <= k
        assert all(0 <= slot < k for slot in slots)
        if inside:
            assert mean_age(entries, now) == pytest.approx(sum(now - step for step in inside) / len(inside))
            assert share_of(entries, inside[0]) == inside.count(inside[0]) / len(inside)


def test_blending_entry_by_entry_gives_their_mean() -> None:
    entries = (Entry(1, 2, 0), Entry(5, 1, 1), Entry(9, 3, 2))
    values, mean = (10.0, -4.0, 2.0), 0.0
    for value, weight in zip(values, blends(entries), strict=True):
        mean += weight * (value - mean)

    assert mean == pytest.approx((2 * 10.0 - 4.0 + 3 * 2.0) / 6)


@pytest.mark.parametrize("kept", [[(1, 1), (1, 1)], [(2, 1), (1, 1)], [(1, 0)], [(1, 2), (2, 2)]])
def test_invalid_window_is_not_restored(kept: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="are not the steps and counts of a window of 3 snapshots"):
        restored(kept, 3)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


@pytest.mark.parametrize(("k", "every"), [(1, 1), (4, 1), (3, 5), (7, 4)])
def test_published_mean_is_that_of_its_snapshots(core: ServerCore, k: int, every: int) -> None:
    """Against a mean in float64, within a rounding of values below 4 for each of the k - 1 blends."""
    chance = random.Random(k)
    names = [f"window:{k},every={every},name=single", f"window:{k},every={every},acc=float64,name=double"]
    joined(core.join("r", _MANIFEST, ["raw", *names], first_step=3))
    steps: list[int] = []
    step = 2
    for _ in range(40):
        step += chance.choice((1, 1, 1, 2, 3, 8))
        core.apply("r", step, _weights(step))
        steps.append(step)
        inside = _dense(steps, k, every, origin=2)
        if len(steps) % 8 or not inside:
            continue
        versions = versions_by_average(core.publish("r"))
        for tensor in ("single", "half", "statistic"):
            exact = sum(_weights(inner)[tensor].double() for inner in inside) / len(inside)
            for name, bound in (("single", 12 * 4 * EPS32 * k), ("double", 8 * EPS32)):
                difference = (core.load(versions[name])[tensor].double() - exact).abs().max().item()
                assert difference <= bound, (name, tensor)
        assert core.load(versions["single"])["seen"] == inside[-1]


def test_window_copies_the_weights_before_its_first_point(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["window:3,every=10"]))
    for step in (4, 7, 11, 12):
        core.apply("r", step, _weights(step))
        version = versions_by_average(core.publish("r"))["window-3-every-10"]
        expected = _weights(11 if step == 12 else step)["single"]
        assert torch.equal(core.load(version)["single"], expected)


def test_set_empties_the_window(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["window:3"]))
    for step in (1, 2, 3, 4):
        core.apply("r", step, _weights(step))
    core.apply("r", 6, _weights(6), mode="set")
    version = versions_by_average(core.publish("r"))["window-3"]
    assert torch.equal(core.load(version)["single"], _weights(6)["single"])
    core.apply("r", 7, _weights(7))

    version = versions_by_average(core.publish("r"))["window-3"]
    exact = (2 * _weights(6)["single"].double() + _weights(7)["single"].double()) / 3
    torch.testing.assert_close(core.load(version)["single"].double(), exact, rtol=0, atol=48 * EPS32)


def test_window_snapshots_are_in_the_generation_but_not_in_the_version(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["window:3", "raw"]))
    for step in (1, 2, 3, 4, 5):
        core.apply("r", step, _weights(step))
    version = versions_by_average(core.publish("r"))["window-3"]

    generation = version.folder.parents[1]
    held = sorted((generation / "windows" / "window-3").iterdir())
    assert [path.name for path in held] == ["000.safetensors", "001.safetensors", "002.safetensors"]
    assert {file.name for file in version.files} == {"model.safetensors", "version.json"}


def test_window_takes_memory_for_its_snapshots_and_its_mean(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["window:3", "ema:0.9"]))
    core.apply("r", 1, _weights(1))

    status = core.statuses.get("r")
    assert status is not None
    wide = sum(spec.elements * (8 if spec.dtype == "I64" else 4) for spec in _MANIFEST.tensors)
    assert status.memory_bytes == 2 * wide + 3 * _MANIFEST.nbytes


def test_window_survives_a_restart_and_a_rewind(tmp_path: Path) -> None:
    """The mean of steps 4, 5, 6 after a restart at 5; after a rewind to 3, that of 2, 3 and the new 4."""
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["window:3"]))
        for step in (1, 2, 3):
            core.apply("r", step, _weights(step))
        durable(core.publish("r", "checkpoint"))
        for step in (4, 5):
            core.apply("r", step, _weights(step))
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["window:3"], first_step=6))
        core.apply("r", 6, _weights(6))
        _check_mean(core, (4, 5, 6))
        assert not isinstance(core.rewind("r", 3), Failed)
        core.apply("r", 4, _weights(104))
        _check_mean(core, (2, 3, 104))


def _check_mean(core: ServerCore, seeds: tuple[int, ...]) -> None:
    version = versions_by_average(core.publish("r"))["window-3"]
    exact = sum(_weights(seed)["single"].double() for seed in seeds) / len(seeds)
    torch.testing.assert_close(core.load(version)["single"].double(), exact, rtol=0, atol=96 * EPS32)


def test_window_that_does_not_fit_is_refused_with_its_size(core: ServerCore, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(100 * _MANIFEST.nbytes, 0, -_MANIFEST.nbytes))
    monkeypatch.setattr("ema_server.compute.memory.available_bytes", lambda: next(left, 0))
    answer = core.join("r", _MANIFEST, ["window:200"])

    assert isinstance(answer, Refused)
    wide = sum(spec.elements * (8 if spec.dtype == "I64" else 4) for spec in _MANIFEST.tensors)
    assert f"need {wide + 200 * _MANIFEST.nbytes} bytes of memory" in answer.text


@pytest.mark.process
def test_long_window_is_published_with_few_open_files(tmp_path: Path) -> None:
    """As in `ema serve`: the limit that programs with select() need is lifted first."""
    script = """
        import resource, sys, torch
        from pathlib import Path
        from ema_server.storage.disk import allow_open_files
        from support.server_core import durable, joined, running_core, manifest_of
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        allow_open_files()
        weights = {"w": torch.ones(3)}
        with running_core(Path(sys.argv[1])) as core:
            joined(core.join("r", manifest_of(weights), ["window:120"]))
            for step in range(1, 121):
                core.apply("r", step, weights)
            print(durable(core.publish("r")).step)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(SUPPORT.parent), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env={**os.environ, **path})

    assert (done.stdout, done.stderr) == ("120\n", "")
