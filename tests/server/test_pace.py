"""Averages given in samples or epochs count with the trainer's pace: through restarts, rewinds and changes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ema_proto.pace import Pace
from ema_server.jobs import Changed, Rewound, Unchanged
from support.keeper import Keeper, joined, keeping, manifest_of, versions_by_average

_ONE = {"w": torch.ones(3)}
_MANIFEST = manifest_of(_ONE)
_SAMPLES, _EPOCHS = "ema:half_life_samples=320,name=samples", "ema:half_life_epochs=2,name=epochs"


def _begin(keeper: Keeper) -> None:
    """Zeros at step 1, ones after: an average is then one minus what is left of the zeros."""
    joined(keeper.join("r", _MANIFEST, [_SAMPLES, _EPOCHS], pace=Pace(32, 5)))
    keeper.apply("r", 1, {"w": torch.zeros(3)})


def _stream(keeper: Keeper, *steps: int) -> None:
    for step in steps:
        keeper.apply("r", step, _ONE)


def _kept(keeper: Keeper) -> dict[str, float]:
    """What is left of the zeros."""
    versions = versions_by_average(keeper.publish("r"))
    return {name: 1.0 - keeper.load(version)["w"][0].item() for name, version in versions.items()}


def _paces(keeper: Keeper) -> list[tuple[int, float | None, float | None]]:
    version = keeper.catalog.find("r", "samples", "latest")
    assert version is not None
    paces = json.loads((version.folder / "version.json").read_text())["paces"]
    return [(told["from_step"], told["samples_per_step"], told["steps_per_epoch"]) for told in paces]


def test_half_lives_in_samples_and_epochs_are_those_steps(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        _begin(keeper)
        _stream(keeper, 2, 3, 7, 11)

        assert _kept(keeper) == pytest.approx({"samples": 0.5, "epochs": 0.5}, abs=1e-6)


def test_what_a_rule_in_samples_came_to_is_told_with_its_versions(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        _begin(keeper)
        _stream(keeper, 2, 3)
        version = versions_by_average(keeper.publish("r"))["samples"]
    with keeping(tmp_path) as keeper:
        found = keeper.catalog.find("r", "samples", "latest")

    assert found == version
    assert (found.decay, found.half_life_steps) == pytest.approx((0.5**0.1, 10.0), rel=1e-12)
    told = json.loads((version.folder / "version.json").read_text())
    assert (told["decay"], told["half_life_steps"]) == (version.decay, version.half_life_steps)


def test_another_pace_holds_from_the_first_step_of_its_session_on_and_outlives_a_restart(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        _begin(keeper)
        _stream(keeper, 11)
        keeper.publish("r")
    with keeping(tmp_path) as keeper:
        joined(keeper.join("r", _MANIFEST, [_SAMPLES], first_step=12, pace=Pace(samples_per_step=64)))
        _stream(keeper, 16)
        assert _kept(keeper) == pytest.approx({"samples": 0.25, "epochs": 0.5 * 2 ** (-5 / 10)}, abs=1e-6)
        assert _paces(keeper) == [(1, 32.0, 5.0), (12, 64.0, 5.0)]
    with keeping(tmp_path) as keeper:
        joined(keeper.join("r", _MANIFEST, [_EPOCHS], first_step=17))
        _stream(keeper, 21)
        assert _kept(keeper)["samples"] == pytest.approx(0.125, abs=1e-6)
        assert len(_paces(keeper)) == 2, "a session that tells nothing changes nothing"


def test_a_run_that_goes_back_is_counted_with_the_pace_of_the_session_that_streams(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        _begin(keeper)
        keeper.publish("r")
        joined(keeper.join("r", _MANIFEST, [_SAMPLES], first_step=2, pace=Pace(samples_per_step=64)))
        _stream(keeper, 6, 30)
        assert isinstance(keeper.rewind("r", 5), Rewound)
        _stream(keeper, 6)

        assert _kept(keeper)["samples"] == pytest.approx(0.5, abs=1e-6)
        assert _paces(keeper) == [(1, 32.0, 5.0), (2, 64.0, 5.0)]


def test_an_average_added_later_needs_a_pace_that_was_told_and_patterns_that_mean_something(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        joined(keeper.join("r", _MANIFEST, ["raw"], pace=Pace(samples_per_step=32)))
        _stream(keeper, 1)

        refused = keeper.add("r", _EPOCHS)
        assert isinstance(refused, Unchanged)
        assert "steps_per_epoch=" in refused.text
        refused = keeper.add("r", "ema:0.9,include=v,name=x")
        assert isinstance(refused, Unchanged)
        assert "'v'" in refused.text
        assert keeper.add("r", _SAMPLES) == Changed("samples")
