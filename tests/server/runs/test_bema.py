"""A `bema` in a run: its three memories, restarts, rewinds, buffers that are not finite, and both kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import UNKNOWN
from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Failed
from ema_server.compute.select import KernelUnavailableError, choose
from ema_server.rules.contributions import shares_of
from ema_server.rules.ledger import Ledger
from support.oracle import EPS32
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average

_RULE = "bema:every=3,bias_power=0.4,name=b"
_RULES = (_RULE, "bema:every=3,bias_power=0.4,acc=float64,name=wide", "bema:every=2,buffers=average,name=all")


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "single": torch.rand(70, generator=generator) * 8 - 4,
        "half": (torch.rand(33, generator=generator) * 8 - 4).bfloat16(),
        "short": (torch.rand(5, generator=generator) * 8 - 4).half(),
        "statistic": torch.rand(5, generator=generator),
        "seen": torch.tensor(step),
    }


_MANIFEST = manifest_of(_weights(1), {"statistic": Role.BUFFER}, {"single": ("tied",)})


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


def _published(core: ServerCore) -> dict[str, dict[str, Tensor]]:
    return {name: core.load(version) for name, version in versions_by_average(core.publish("r")).items()}


def _expected(spec: str, steps: list[int], tensor: str, *, begins: int) -> Tensor:
    """The sum of the weights in float64, each times its share."""
    ledger = Ledger(0)
    for step in steps:
        ledger.append(step, replaces=step == begins)
    shares = shares_of(parse_average(spec), ledger, lambda _: UNKNOWN)
    return sum((share * _weights(step)[tensor].double() for step, share in shares), torch.zeros(()))


@pytest.mark.parametrize("begins", [0, 9])
def test_published_average_is_that_of_the_formula(core: ServerCore, begins: int) -> None:
    joined(core.join("r", _MANIFEST, _RULES))
    core.apply("r", 0, _weights(0), "set")
    steps = [0, 1, 2, 3, 7, 8, 9, 10, 11, 14, 19, 20]
    for step in steps[1:]:
        core.apply("r", step, _weights(step), "set" if step == begins else "update")

    found = _published(core)
    for spec in _RULES:
        name = spec.partition("name=")[2]
        tensors = ["single", "half", "short", *(["statistic"] if name == "all" else [])]
        for tensor in tensors:
            exact = _expected(spec, steps, tensor, begins=begins)
            bound = (4 if name == "wide" else 100) * 8 * EPS32
            assert (found[name][tensor].double() - exact).abs().max().item() <= bound, (name, tensor)
        assert torch.equal(found[name]["tied"], found[name]["single"])
    newest_update = 19  # it represents steps 15 to 19, 18 among them; no update is due at 20
    for name in ("b", "wide"):
        assert found[name]["seen"] == newest_update
        assert torch.equal(found[name]["statistic"], _weights(newest_update)["statistic"])


def _run_to(core: ServerCore, first: int, last: int) -> None:
    joined(core.join("r", _MANIFEST, _RULES, first_step=max(first, 1)))
    for step in range(first, last + 1):
        core.apply("r", step, _weights(step), "set" if step == 0 else "update")


def _same(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return all(torch.equal(one[name][tensor], other[name][tensor]) for name in one for tensor in one[name])


def test_restart_and_rewind_do_not_change_the_average(tmp_path: Path) -> None:
    with running_core(tmp_path / "whole") as core:
        _run_to(core, 0, 20)
        whole = _published(core)
    with running_core(tmp_path / "parts") as core:
        _run_to(core, 0, 8)
        durable(core.publish("r", "checkpoint"))
        for step in (9, 10, 11):
            core.apply("r", step, _weights(step + 100))
        assert not isinstance(core.rewind("r", 8), Failed)
        for step in (9, 10):
            core.apply("r", step, _weights(step))
        status = core.statuses.get("r")
    with running_core(tmp_path / "parts") as core:
        _run_to(core, 11, 20)
        parts = _published(core)

    assert status is not None
    assert _same(whole, parts)


def test_initial_weights_and_moving_average_are_in_the_generation_only(core: ServerCore) -> None:
    _run_to(core, 0, 7)
    version = versions_by_average(core.publish("r"))["b"]

    held = sorted((version.folder.parents[1] / "windows" / "b").iterdir())
    assert [path.name for path in held] == ["initial.safetensors", "moving.safetensors"]
    assert {file.name for file in version.files} == {"model.safetensors", "version.json"}


def test_memory_is_that_of_two_averages_and_a_snapshot(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["bema"]))
    core.apply("r", 1, _weights(1))

    status = core.statuses.get("r")
    assert status is not None
    wide = sum(spec.elements * (8 if spec.dtype == "I64" else 4) for spec in _MANIFEST.tensors)
    assert status.memory_bytes == 2 * wide + _MANIFEST.nbytes


@pytest.mark.parametrize("bad_at", [4, 6, 9])
def test_buffer_that_is_not_finite_keeps_its_last_value(core: ServerCore, bad_at: int) -> None:
    """Of an update that is due (6, 9), and of one that is not: the other tensors are updated."""
    joined(core.join("r", _MANIFEST, ["bema:every=3,buffers=average,name=b"]))
    core.apply("r", 0, _weights(0), "set")
    kept = None
    for step in range(1, 10):
        weights = _weights(step)
        if step == bad_at:
            kept = _published(core)["b"]["statistic"]
            weights["statistic"] = torch.full((5,), math.nan)
        core.apply("r", step, weights)
        if step == bad_at:
            assert kept is not None
            assert torch.equal(_published(core)["b"]["statistic"], kept)

    exact = _expected("bema:every=3,buffers=average", list(range(10)), "single", begins=0)
    assert (_published(core)["b"]["single"].double() - exact).abs().max().item() <= 100 * 8 * EPS32


def test_set_with_a_buffer_that_is_not_finite_begins_with_the_last_value(core: ServerCore) -> None:
    _run_to(core, 0, 7)
    before = _published(core)
    core.apply("r", 8, _weights(8) | {"statistic": torch.full((5,), math.nan)}, "set")
    after = _published(core)
    core.apply("r", 10, _weights(10))  # an update of `all`, whose initial statistics are those kept

    assert torch.equal(after["all"]["statistic"], before["all"]["statistic"])
    assert torch.equal(after["all"]["single"], _weights(8)["single"])
    assert torch.isfinite(_published(core)["all"]["statistic"]).all()


def test_kernels_give_the_same_bits(tmp_path: Path) -> None:
    try:
        choose("compiled", torch.device("cpu"))
    except KernelUnavailableError:
        pytest.skip("numba is not installed")
    found = []
    for kernel in ("torch", "compiled"):
        with running_core(tmp_path / kernel, kernel=kernel) as core:
            _run_to(core, 0, 20)
            found.append(_published(core))

    assert _same(*found)


def test_average_that_is_added_later_begins_with_the_next_snapshot(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["raw"]))
    core.apply("r", 1, _weights(1))
    core.add("r", "bema:every=2")
    for step in (2, 3, 4, 5):
        core.apply("r", step, _weights(step))

    ledger = Ledger(1)
    for step in (2, 3, 4, 5):
        ledger.append(step)
    shares = shares_of(parse_average("bema:every=2"), ledger, lambda _: UNKNOWN)
    exact = sum((share * _weights(step)["single"].double() for step, share in shares), torch.zeros(()))
    found = _published(core)["bema-every-2"]["single"]
    assert (found.double() - exact).abs().max().item() <= 100 * 8 * EPS32
