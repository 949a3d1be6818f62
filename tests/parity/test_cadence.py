"""A cadence changes a library's average and not ours: `every` belongs to the transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_reader import Reader
from support.libraries import library
from support.oracle import EPS32
from support.parity_model import STEPS, ProfileModel
from support.processes import ServerProcess
from trainer_client import EmaClient

_EVERY = 10
_POWER = "power:sigma_rel=0.05"
_RULES = (_POWER, "ema:0.99", "ema:0.999,warmup=timm", "ema:0.99,warmup=debias", "swa", "wsd:start=300,steps=500")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


def _streamed(server: ServerProcess, run: str, steps: range, every: int = 1) -> dict[str, Tensor]:
    """The profiles of our averages by rule, of a run that begins at step 0 and sends these steps."""
    model = ProfileModel()
    with EmaClient(server.zmq, run, _RULES, step=0, every=every, when_behind="wait") as client:
        for step in steps:
            client.update(model.at(step), step)
    with Reader(server.http) as reader:
        return {rule: reader.load(reader.version(run, parse_average(rule).name))["profile"].double() for rule in _RULES}


def _width(profile: Tensor) -> float:
    """Standard deviation of the weights over the steps, relative to the steps so far."""
    steps = torch.arange(len(profile), dtype=torch.float64)
    mean = (profile * steps).sum()
    return float((profile * (steps - mean) ** 2).sum().sqrt() / STEPS)


def test_karras_ema_is_our_power_rule_without_its_first_step(server: ServerProcess) -> None:
    """It counts one additional step, as if a step 0 had been missed."""
    model = ProfileModel()
    karras = library("ema_pytorch").KarrasEMA(model, sigma_rel=0.05, update_every=1)
    for step in range(1, STEPS + 1):
        model.at(step + 1)
        karras.update()

    ours = _streamed(server, "shifted", range(2, STEPS + 2))[_POWER]
    theirs = karras.ema_model.profile.detach()
    assert ((ours - theirs).abs() <= EPS32 * theirs + 1e-12).all()


def test_power_profile_keeps_its_width_at_every_cadence_unlike_ema_pytorch(
    server: ServerProcess,
) -> None:
    """A README's `update_every=10` makes of 0.05 a profile of 0.25, close to the mean of all weights."""
    model = ProfileModel()
    karras = library("ema_pytorch").KarrasEMA(model, sigma_rel=0.05, update_every=_EVERY)
    for step in range(1, STEPS + 1):
        model.at(step)
        karras.update()

    ours = _streamed(server, "sparse-power", range(1, STEPS + 1), every=_EVERY)[_POWER]
    assert _width(karras.ema_model.profile.detach()) > 0.2
    assert _width(ours) == pytest.approx(0.05, rel=0.02)


def test_half_life_counts_steps_and_not_updates_as_in_ema_pytorch(server: ServerProcess) -> None:
    model = ProfileModel()
    ema = library("ema_pytorch").EMA(model, beta=0.99, update_after_step=0, update_every=_EVERY, min_value=0.99)
    for step in range(1, STEPS + 1):
        model.at(step)
        ema.update()

    theirs = ema.ema_model.profile.detach()
    ours = _streamed(server, "sparse-ema", range(1, STEPS + 1), every=_EVERY)["ema:0.99"]
    half = 1 - 0.99**70  # nearly
    assert float(ours[STEPS - 70 + 1 :].sum()) == pytest.approx(half)
    assert float(theirs[STEPS - 70 * _EVERY + 1 :].sum()) == pytest.approx(half)


def test_each_tenth_step_weighs_as_much_as_ten_steps(server: ServerProcess) -> None:
    """For every rule: what the dense stream gives, on weights that are constant over each ten steps."""
    dense = _streamed(server, "dense", range(1, STEPS + 1))
    sparse = _streamed(server, "sparse", range(1, STEPS + 1), every=_EVERY)

    for rule in _RULES:
        expected = torch.zeros_like(dense[rule])
        expected[_EVERY : STEPS + 1 : _EVERY] = dense[rule][1 : STEPS + 1].reshape(-1, _EVERY).sum(dim=1)
        assert (sparse[rule] - expected).abs().max() <= _EVERY * EPS32, rule
