"""Averages with a warm-up follow timm's own ModelEmaV3, run here on the same weights, and a float64 replay of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_proto.wire.manifest import Role
from ema_server.storage.catalog import Version
from support.oracle import EPS32, largest_difference
from support.real_timm import model_ema
from support.server_core import ServerCore, joined, manifest_of, running_core, versions_by_average

_STEPS = 220
_LARGEST = 4.0

_RULES: dict[str, dict[str, Any]] = {
    "ema:0.9": {"decay": 0.9},
    "ema:0.9999,warmup=timm": {"decay": 0.9999, "use_warmup": True},
    "ema:0.97,warmup=timm": {"decay": 0.97, "use_warmup": True},
    "ema:0.99,warmup=timm,gamma=7,power=0.75,min=0.4,update_after=20": {
        "decay": 0.99,
        "use_warmup": True,
        "warmup_gamma": 7.0,
        "warmup_power": 0.75,
        "min_decay": 0.4,
        "update_after_step": 20,
    },
    "ema:0.95,update_after=30": {"decay": 0.95, "update_after_step": 30},
    "ema:0.95,warmup=timm,buffers=copy": {"decay": 0.95, "use_warmup": True, "exclude_buffers": True},
}


class _Walk:
    """A model with batch norm, moved at random by seeded steps; no two steps have the same statistics."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def step(self) -> None:
        self.model(torch.randn(16, 6))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02).clamp_(-_LARGEST, _LARGEST)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


def _replayed(step_weights: list[dict[str, Tensor]], timms: Any, *, copied: set[str]) -> dict[str, Tensor]:
    """The average in float64, by timm's get_decay alone."""
    average = {name: value.double() for name, value in step_weights[0].items()}
    for step, weights in enumerate(step_weights[1:], start=2):
        decay = timms.get_decay(step)
        for name, value in weights.items():
            is_averaged = value.is_floating_point() and name not in copied
            new = value.double()
            average[name] = average[name] * decay + new * (1 - decay) if is_averaged else new
    return average


def _manifest_of(model: nn.Module) -> Any:
    return manifest_of(model.state_dict(), {name: Role.BUFFER for name, _ in model.named_buffers()})


def test_every_rule_equals_timms_class_and_a_float64_replay(core: ServerCore) -> None:
    """One update rounds by at most 9 units of a value's last place; with decay 0.9999 they add up step by step."""
    walk = _Walk()
    timms = {rule: model_ema().ModelEmaV3(walk.model, **given) for rule, given in _RULES.items()}
    joined(core.join("r", _manifest_of(walk.model), list(_RULES)))
    seen: list[dict[str, Tensor]] = []
    for step in range(1, _STEPS + 1):
        walk.step()
        seen.append({name: value.clone() for name, value in walk.model.state_dict().items()})
        core.apply("r", step, walk.model.state_dict())
        for average in timms.values():
            average.update(walk.model, step=step)

    versions = versions_by_average(core.publish("r"))
    buffers = {name for name, _ in walk.model.named_buffers()}
    for rule, average in timms.items():
        version = versions[rule.replace(":", "-").replace(",", "-").replace("=", "-")]
        loaded, bound = core.load(version), _STEPS * 9 * EPS32 * _LARGEST
        replayed = _replayed(seen, average, copied=buffers if average.exclude_buffers else set())
        for name, value in loaded.items():
            assert (value.double() - replayed[name]).abs().max() <= bound, (rule, name)
        assert largest_difference(average.module.state_dict(), loaded) <= bound, rule


def test_rules_differ_by_far_more_than_the_tolerance(core: ServerCore) -> None:
    """Otherwise the comparison above could not fail."""
    walk = _Walk()
    joined(core.join("r", _manifest_of(walk.model), list(_RULES)))
    for step in range(1, _STEPS + 1):
        walk.step()
        core.apply("r", step, walk.model.state_dict())

    loaded = [core.load(version) for version in versions_by_average(core.publish("r")).values()]
    for index, one in enumerate(loaded):
        for other in loaded[index + 1 :]:
            assert largest_difference(one, other) > 10 * _STEPS * 9 * EPS32 * _LARGEST


def test_copied_buffers_are_the_newest_while_another_average_averages_them(core: ServerCore) -> None:
    walk = _Walk()
    joined(core.join("r", _manifest_of(walk.model), ["ema:0.9", "ema:0.9,buffers=copy", "raw"]))
    for step in (1, 2, 3):
        walk.step()
        core.apply("r", step, walk.model.state_dict())

    versions = versions_by_average(core.publish("r"))
    copied, averaged = (core.load(versions[name]) for name in ("ema-0.9-buffers-copy", "ema-0.9"))
    assert torch.equal(copied["1.running_mean"], walk.model.state_dict()["1.running_mean"])
    assert not torch.equal(averaged["1.running_mean"], copied["1.running_mean"])
    assert torch.equal(averaged["1.weight"], copied["1.weight"])
    assert not torch.equal(averaged["1.weight"], walk.model.state_dict()["1.weight"])


def test_dropped_steps_count_as_if_with_the_next_weights(core: ServerCore) -> None:
    """Against timm's class, updated once for each dropped step with the weights of the next received one."""
    rule = "ema:0.999,warmup=timm,power=0.8"
    walk = _Walk()
    timms = model_ema().ModelEmaV3(walk.model, decay=0.999, use_warmup=True, warmup_power=0.8)
    joined(core.join("r", _manifest_of(walk.model), [rule]))
    last = 0
    for step in (1, 2, 3, 11, 12, 13, 60, 61, 62, 63, 100):
        walk.step()
        core.apply("r", step, walk.model.state_dict())
        for missed in range(last + 1, step + 1):
            timms.update(walk.model, step=missed)
        last = step

    (version,) = versions_by_average(core.publish("r")).values()
    assert version.gap_steps == 7 + 46 + 36
    assert largest_difference(timms.module.state_dict(), core.load(version)) <= 100 * 9 * EPS32 * _LARGEST


def test_warmup_continues_after_a_restart_and_counts_from_the_first_join(tmp_path: Path) -> None:
    """A run joined after 1,000 steps warms up from there; a restart of the server does not restart the warm-up."""
    rule = "ema:0.999,warmup=timm,update_after=2,buffers=copy"
    walk = _Walk()
    timms = model_ema().ModelEmaV3(walk.model, 0.999, use_warmup=True, update_after_step=2, exclude_buffers=True)
    version: Version | None = None
    for part in (range(1, 8), range(8, 15)):
        with running_core(tmp_path) as core:
            joined(core.join("r", _manifest_of(walk.model), [rule], first_step=1000 + part[0]))
            for step in part:
                walk.step()
                core.apply("r", 1000 + step, walk.model.state_dict())
                timms.update(walk.model, step=step)
            (version,) = versions_by_average(core.publish("r")).values()
            loaded = core.load(version)

    assert version is not None
    assert json.loads((version.folder / "version.json").read_text())["ledger"]["origin"] == 1000
    assert largest_difference(timms.module.state_dict(), loaded) <= 14 * 9 * EPS32 * _LARGEST
