"""Decay and half-life for display, during and after a warm-up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ema_proto.averages.rules import AverageSpec, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_server.averager.jobs import Applied
from ema_server.rules.weights import reach_now
from support.server_core import joined, manifest_of, running_core

_ONE = {"w": torch.ones(3)}


@pytest.mark.parametrize(
    ("rule", "step", "decay"),
    [
        (Ema(0.999), 110, 0.999),
        (Ema(0.999), 10, 0.0),
        (Ema(0.999, init="start"), 11, 0.999),
        (Ema(half_life=7), 110, 2 ** (-1 / 7)),
        (Ema(half_life_samples=70), 110, 2 ** (-1 / 7)),
        (Ema(half_life_epochs=0.14), 110, 2 ** (-1 / 7)),
        (Ema(0.999, warmup="timm"), 110, 1 - 100 ** (-2 / 3)),
        (PowerEma(gamma=1), 110, 0.99**2),
        (Uniform(), 110, 0.99),
        (Uniform(every=10), 110, 0.9**0.1),
        (Uniform(start=200), 110, 0.0),
        (Wsd(60, 100), 110, 49 / 50),
        (Wsd(60, 10), 110, 1.0),
    ],
    ids=lambda value: getattr(value, "spec", str(value)),
)
def test_current_decay_is_that_of_the_last_step(rule: AverageSpec, step: int, decay: float) -> None:
    reach = reach_now(rule, step, 10, StepUnits(10, 50))

    assert reach is not None
    assert reach.decay == pytest.approx(decay, rel=1e-12)
    if decay == 1.0:
        assert reach.half_life_steps == math.inf
    else:
        assert reach.decay**reach.half_life_steps == pytest.approx(0.5 if decay else 1.0, rel=1e-12)


def test_half_life_of_a_decay_just_below_1_is_precise() -> None:
    reach = reach_now(Ema(1 - 2.0**-50), 110, 10, UNKNOWN)

    assert reach is not None
    assert reach.half_life_steps == pytest.approx(2.0**50 * math.log(2), rel=1e-12)


def test_rule_in_samples_has_the_decay_for_the_samples_per_step() -> None:
    rule = Ema(half_life_samples=3200)
    slow, fast = (reach_now(rule, 110, 10, StepUnits(samples_per_step=samples)) for samples in (32, 64))

    assert slow is not None
    assert fast is not None
    assert (slow.half_life_steps, fast.half_life_steps) == pytest.approx((100.0, 50.0), rel=1e-12)
    assert fast.decay == pytest.approx(slow.decay**2, rel=1e-12)


@pytest.mark.parametrize("error", [ZeroDivisionError(), OverflowError(), ValueError()], ids=repr)
def test_uncomputable_decay_is_left_out_and_averaging_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("ema_server.rules.weights.reach_now", refuse)
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(_ONE), ["ema:0.9"]))
        for step in (1, 2, 3):
            assert isinstance(core.apply("r", step, _ONE), Applied)
        status = core.statuses.get("r")

        assert status is not None
        assert (status.averages[0].decay, status.averages[0].updates) == (None, 3)


def test_raw_and_windows_have_no_decay() -> None:
    assert [reach_now(rule, 9, 0, UNKNOWN) for rule in (Raw(), Window(3))] == [None, None]
