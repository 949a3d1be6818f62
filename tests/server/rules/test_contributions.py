"""The shares of the steps, times the weights after these steps, add up to the average."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_proto.wire.messages import Mode
from ema_server.rules.contributions import shares_of
from ema_server.rules.ledger import Ledger
from support.oracle import EPS32
from support.server_core import ServerCore, joined, manifest_of, running_core, versions_by_average

_RULES = (
    "raw",
    "ema:0.9",
    "ema:0.99,warmup=timm",
    "ema:half_life_samples=100",
    "ema:0.999,warmup=debias",
    "power:sigma_rel=0.1",
    "swa:start=7,every=3",
    "window:4",
    "window:3,every=5",
    "window:3,every=1000",
    "wsd:start=10,steps=20,shape=sqrt",
    "wsd:start=2,steps=5",
    "bema:every=4",
    "bema:every=3,ema_power=0.7,bias_power=0.5,lag=3,multiplier=0.5,min=0.2,update_after=8",
    "bema:every=1000",
)


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.rand(50, generator=generator) * 2 - 1}


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


@pytest.mark.parametrize("set_at", [None, 12, 31])
def test_average_is_the_sum_of_weights_times_shares(core: ServerCore, set_at: int | None) -> None:
    """For every rule, with gaps, a set, and step units that change: in float64, within a few roundings of float32."""
    slow, fast = StepUnits(samples_per_step=5.0), StepUnits(samples_per_step=8.0)
    joined(core.join("r", manifest_of(_weights(1)), _RULES, first_step=3, step_units=slow))
    for step in (3, 4, 5, 9, 10, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33):
        mode: Mode = "set" if step == set_at else "update"
        core.apply("r", step, _weights(step), mode)
        if step == 14:
            joined(core.join("r", manifest_of(_weights(1)), _RULES, first_step=15, step_units=fast, reconnect=True))

    for name, version in versions_by_average(core.publish("r")).items():
        written = json.loads((version.folder / "version.json").read_text())
        rule, ledger = parse_average(written["spec"], name=name), Ledger.from_json(written["ledger"])
        shares = list(shares_of(rule, ledger, lambda step: slow if step < 15 else fast))
        assert [step for step, _ in shares] == sorted({step for step, _ in shares}, reverse=True), name
        assert sum(share for _, share in shares) == pytest.approx(1, abs=1e-12), name
        rebuilt = sum(share * _weights(step)["w"].double() for step, share in shares)
        assert (core.load(version)["w"].double() - rebuilt).abs().max().item() <= 40 * EPS32, name


def test_average_without_steps_has_no_shares() -> None:
    assert list(shares_of(parse_average("window:3"), Ledger(5), lambda _: UNKNOWN)) == []
    assert list(shares_of(parse_average("ema:0.9"), Ledger(5), lambda _: UNKNOWN)) == []


def test_negligible_steps_are_not_visited() -> None:
    """Ten million steps of which 0.9 leaves a few hundred: the rest would not change a float64 sum."""
    ledger = Ledger.from_json({"origin": 0, "set": [1], "ranges": [[1, 10_000_000, 1]]})

    shares = list(shares_of(parse_average("ema:0.9"), ledger, lambda _: UNKNOWN))

    assert 400 < len(shares) < 500
    assert shares[0][0] == 10_000_000
    assert shares[0][1] == pytest.approx(0.1)
    assert sum(share for _, share in shares) == pytest.approx(1, abs=1e-15)
