"""Averages given in samples or epochs use the trainer's step units, across restarts, rewinds and changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ema_proto.averages.step_units import StepUnits
from ema_server.averager.jobs import Changed, Rewound, Unchanged
from support.server_core import ServerCore, joined, manifest_of, running_core, versions_by_average

_ONE = {"w": torch.ones(3)}
_MANIFEST = manifest_of(_ONE)
_SAMPLES, _EPOCHS = "ema:half_life_samples=320,name=samples", "ema:half_life_epochs=2,name=epochs"


def _begin(core: ServerCore) -> None:
    """Zeros at step 1, ones after: an average is then one minus what is left of the zeros."""
    joined(core.join("r", _MANIFEST, [_SAMPLES, _EPOCHS], step_units=StepUnits(32, 5)))
    core.apply("r", 1, {"w": torch.zeros(3)})


def _stream(core: ServerCore, *steps: int) -> None:
    for step in steps:
        core.apply("r", step, _ONE)


def _kept(core: ServerCore) -> dict[str, float]:
    """What is left of the zeros."""
    versions = versions_by_average(core.publish("r"))
    return {name: 1.0 - core.load(version)["w"][0].item() for name, version in versions.items()}


def _step_units_history(core: ServerCore) -> list[tuple[int, float | None, float | None]]:
    version = core.catalog.find("r", "samples", "latest")
    assert version is not None
    paces = json.loads((version.folder / "version.json").read_text())["paces"]
    return [(units["from_step"], units["samples_per_step"], units["steps_per_epoch"]) for units in paces]


def test_half_lives_in_samples_and_epochs_convert_to_steps(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        _stream(core, 2, 3, 7, 11)

        assert _kept(core) == pytest.approx({"samples": 0.5, "epochs": 0.5}, abs=1e-6)


def test_versions_state_the_decay_of_a_rule_in_samples(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        _stream(core, 2, 3)
        version = versions_by_average(core.publish("r"))["samples"]
    with running_core(tmp_path) as core:
        found = core.catalog.find("r", "samples", "latest")

    assert found == version
    assert (found.decay, found.half_life_steps) == pytest.approx((0.5**0.1, 10.0), rel=1e-12)
    content = json.loads((version.folder / "version.json").read_text())
    assert (content["decay"], content["half_life_steps"]) == (version.decay, version.half_life_steps)


def test_new_step_units_apply_from_their_session_and_survive_a_restart(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        _stream(core, 11)
        core.publish("r")
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, [_SAMPLES], first_step=12, step_units=StepUnits(samples_per_step=64)))
        _stream(core, 16)
        assert _kept(core) == pytest.approx({"samples": 0.25, "epochs": 0.5 * 2 ** (-5 / 10)}, abs=1e-6)
        assert _step_units_history(core) == [(1, 32.0, 5.0), (12, 64.0, 5.0)]
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, [_EPOCHS], first_step=17))
        _stream(core, 21)
        assert _kept(core)["samples"] == pytest.approx(0.125, abs=1e-6)
        assert len(_step_units_history(core)) == 2, "a session that tells nothing changes nothing"


def test_rewound_run_uses_the_step_units_of_its_new_session(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _begin(core)
        core.publish("r")
        joined(core.join("r", _MANIFEST, [_SAMPLES], first_step=2, step_units=StepUnits(samples_per_step=64)))
        _stream(core, 6, 30)
        assert isinstance(core.rewind("r", 5), Rewound)
        _stream(core, 6)

        assert _kept(core)["samples"] == pytest.approx(0.5, abs=1e-6)
        assert _step_units_history(core) == [(1, 32.0, 5.0), (2, 64.0, 5.0)]


def test_added_average_needs_known_step_units_and_matching_patterns(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["raw"], step_units=StepUnits(samples_per_step=32)))
        _stream(core, 1)

        refused = core.add("r", _EPOCHS)
        assert isinstance(refused, Unchanged)
        assert "steps_per_epoch=" in refused.text
        refused = core.add("r", "ema:0.9,include=v,name=x")
        assert isinstance(refused, Unchanged)
        assert "'v'" in refused.text
        assert core.add("r", _SAMPLES) == Changed("samples")


def test_rewind_from_disk_keeps_the_units_of_an_added_average(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["raw"]))
        _stream(core, 1)
        core.publish("r")
        joined(core.join("r", _MANIFEST, ["raw"], first_step=2, step_units=StepUnits(samples_per_step=32)))
        _stream(core, 2)
        assert core.add("r", _SAMPLES) == Changed("samples")
    with running_core(tmp_path) as core:
        assert joined(core.join("r", _MANIFEST, ["raw"], first_step=2)).continuation == "rewound"
        core.apply("r", 2, {"w": torch.zeros(3)})
        _stream(core, 12)

        assert _kept(core)["samples"] == pytest.approx(0.5, abs=1e-6)
