"""The averages of a stream of snapshots, against float64 replays that share no code with the server."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Applied, Quarantined
from ema_server.runs.status_store import NonFiniteBuffers
from ema_server.storage.catalog import Version
from support.arithmetics import check_in_the_pass
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average


@pytest.fixture(params=["before", "by the averager", "in the pass"], ids=lambda when: f"checked {when}")
def core(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerCore]:
    if request.param == "in the pass":
        check_in_the_pass(monkeypatch)
    with running_core(tmp_path, checks_first=request.param == "before") as core:
        yield core


@cache
def _weights(step: int) -> dict[str, Tensor]:
    """A walk within [-4, 4], an integer, and a mask that flips."""
    generator = torch.Generator().manual_seed(step)
    walk = torch.sin(torch.arange(40.0) * (1 + step / 97)) * 3 + torch.rand(40, generator=generator)
    return {"walk": walk, "seen": torch.tensor(step * 3), "mask": torch.arange(5) % (step % 3 + 1) == 0}


_MANIFEST = manifest_of(_weights(1))


def _ledger(version: Version) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads((version.folder / "version.json").read_text())["ledger"]
    return ledger


def _check(core: ServerCore, version: Version, decay: float) -> None:
    ledger = _ledger(version)
    difference = largest_difference(replay(ledger, decay, _weights), core.load(version))
    assert difference <= bound(ledger, decay, 4.0)


def _unit(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), value)}


def test_1000_steps_with_gaps_equal_a_float64_replay_of_the_ledger(core: ServerCore) -> None:
    """Steps are left out one by one and in long rows; the bound follows from float32's eps (`support.oracle.bound`)."""
    chance = random.Random(3)
    decays = {"ema-0.9": 0.9, "ema-0.99": 0.99, "ema-0.999": 0.999, "ema-0.9999": 0.9999, "ema-0": 0.0}
    joined(core.join("r", _MANIFEST, ["raw", *(f"ema:{name[4:]}" for name in decays)]))
    applied: list[int] = []
    step = 0
    while len(applied) < 1000:
        step += 1 if chance.random() < 0.8 else chance.randint(2, 40)
        assert core.apply("r", step, _weights(step)) == Applied(step, frozenset())
        applied.append(step)

    versions = versions_by_average(core.publish("r"))
    for name, decay in decays.items():
        assert ledger_steps(_ledger(versions[name])) == applied
        assert (versions[name].updates, versions[name].gap_steps) == (1000, applied[-1] - applied[0] + 1 - 1000)
        _check(core, versions[name], decay)
    assert largest_difference(_weights(step), core.load(versions["raw"])) == 0


def test_average_equals_timm_model_ema_v3(core: ServerCore) -> None:
    """ModelEmaV3 as timm defines it, written here with torch alone.

    A copy of the model at first, then `lerp` of every float entry of the state dict by 1 - decay, other entries copied;
    batch norm's statistics are averaged like weights.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    roles = {name: Role.BUFFER for name, _ in model.named_buffers()}
    joined(core.join("r", manifest_of(model.state_dict(), roles), ["ema:0.98"]))
    shadow: dict[str, Tensor] = {}
    for step in range(1, 101):
        loss = nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 2, (16,)))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
        for name, value in model.state_dict().items():
            if step == 1 or not value.is_floating_point():
                shadow[name] = value.detach().clone()
            else:
                shadow[name].lerp_(value.detach(), weight=1 - 0.98)
        core.apply("r", step, model.state_dict())

    version = versions_by_average(core.publish("r"))["ema-0.98"]
    assert largest_difference(shadow, core.load(version)) <= bound(_ledger(version), 0.98, 4.0)


def test_unit_step_weighs_1_minus_the_product_of_decays(core: ServerCore) -> None:
    joined(core.join("r", manifest_of(_unit(0.0)), ["ema:0.9"]))
    core.apply("r", 1, _unit(0.0))
    for step, expected in ((2, 1 - 0.9), (3, 1 - 0.9**2), (10, 1 - 0.9**9)):
        core.apply("r", step, _unit(1.0))
        version = versions_by_average(core.publish("r"))["ema-0.9"]
        torch.testing.assert_close(core.load(version)["w"], torch.full((3,), expected), rtol=0, atol=1e-6)


def test_every_does_not_change_the_decay_per_step(core: ServerCore) -> None:
    """A stream of every 5th step weighs each by decay ** 5. Steps between are not a gap, a missing 5th step is."""
    joined(core.join("r", _MANIFEST, ["ema:0.99"], every=5))
    for step in (5, 10, 15, 30, 35):
        core.apply("r", step, _weights(step))

    version = versions_by_average(core.publish("r"))["ema-0.99"]
    assert version.gap_steps == 2
    assert _ledger(version)["ranges"] == [[5, 15, 5], [30, 35, 5]]
    _check(core, version, 0.99)


def test_steps_before_the_first_snapshot_are_not_a_gap(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.99"], first_step=101))
    core.apply("r", 107, _weights(107))
    core.apply("r", 109, _weights(109))

    version = versions_by_average(core.publish("r"))["ema-0.99"]
    assert version.gap_steps == 1
    assert _ledger(version) == {"origin": 100, "set": [107], "ranges": [[107, 109, 2]]}
    status = core.statuses.get("r")
    assert status is not None
    assert (status.first_step, status.step, status.gap_steps, status.applied) == (107, 109, 1, 2)


def test_set_replaces_the_averages_and_is_recorded(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "raw"]))
    for step in (1, 2, 3):
        core.apply("r", step, _weights(step))
    core.apply("r", 9, _weights(9), mode="set")
    version = versions_by_average(core.publish("r"))["ema-0.9"]
    assert largest_difference(_weights(9), core.load(version)) == 0
    assert version.gap_steps == 0
    core.apply("r", 10, _weights(10))

    version = versions_by_average(core.publish("r"))["ema-0.9"]
    assert _ledger(version)["set"] == [1, 9]
    _check(core, version, 0.9)


def test_set_may_repeat_the_last_step_but_not_precede_it(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    core.apply("r", 4, _weights(4))
    core.apply("r", 5, _weights(5))

    assert core.apply("r", 5, _weights(6), mode="set") == Applied(5, frozenset())
    answer = core.apply("r", 4, _weights(4), mode="set")
    assert isinstance(answer, Quarantined)
    assert "below the last applied step 5: rewind first" in answer.text
    version = versions_by_average(core.publish("r"))["ema-0.9"]
    assert largest_difference(_weights(6), core.load(version)) == 0


def test_repeated_step_is_acknowledged_and_not_applied_again(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    for step in (1, 2, 3):
        core.apply("r", step, _weights(step))
    before = versions_by_average(core.publish("r"))

    assert core.apply("r", 3, _weights(77)) == Applied(3, frozenset())
    assert core.apply("r", 2, _weights(77)) == Applied(2, frozenset())
    after = core.publish("r")
    assert versions_by_average(after) == before
    assert not durable(after).new


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_snapshot_changes_nothing_and_is_a_gap(core: ServerCore, bad: float) -> None:
    joined(core.join("r", _MANIFEST, ["raw", "ema:0.9"]))
    core.apply("r", 1, _weights(1))
    core.apply("r", 2, _weights(2))
    before = versions_by_average(core.publish("r"))
    dirty = {**_weights(3), "walk": _weights(3)["walk"].clone()}
    dirty["walk"][17] = bad

    answer = core.apply("r", 3, dirty)

    assert isinstance(answer, Quarantined)
    assert (answer.step, answer.text) == (3, "NaN or Inf at step 3 in 1 tensors: walk")
    status = core.statuses.get("r")
    assert status is not None
    assert status.quarantine is not None
    assert (status.quarantined, status.quarantine.step, status.quarantine.tensors) == (1, 3, ("walk",))
    after = core.publish("r")
    assert (durable(after).step, durable(after).new) == (2, False)
    assert versions_by_average(after) == before, "no bit has changed"
    core.apply("r", 4, _weights(4))
    version = versions_by_average(core.publish("r"))["ema-0.9"]
    assert version.gap_steps == 1
    _check(core, version, 0.9)


def test_nonfinite_first_snapshot_is_quarantined(core: ServerCore) -> None:
    tensors = {"w": torch.tensor([math.nan]), "mask": torch.tensor([-math.inf])}
    joined(core.join("r", manifest_of(tensors, {"mask": Role.BUFFER}), ["ema:0.9"]))

    assert isinstance(core.apply("r", 1, tensors), Quarantined)
    assert durable(core.publish("r")).step is None
    assert core.apply("r", 2, {**tensors, "w": torch.ones(1)}) == Applied(2, frozenset({"mask"}))


def test_mask_of_infinities_is_copied_and_reported(core: ServerCore) -> None:
    def masked(step: int) -> dict[str, Tensor]:
        return {"w": torch.tensor([float(step)]), "mask": torch.tensor([0.0, -math.inf, float(step)])}

    joined(core.join("r", manifest_of(masked(1), {"mask": Role.BUFFER}), ["ema:0.5"]))
    for step in (1, 2, 3):
        assert core.apply("r", step, masked(step)) == Applied(step, frozenset({"mask"}))

    status = core.statuses.get("r")
    assert status is not None
    assert (status.exempt, status.quarantined) == (("mask",), 0)
    loaded = core.load(versions_by_average(core.publish("r"))["ema-0.5"])
    assert torch.equal(loaded["mask"], masked(3)["mask"])
    assert loaded["w"].item() == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3


def test_gap_counts_from_the_refused_step_and_each_spell_is_logged_twice(
    core: ServerCore, caplog: pytest.LogCaptureFixture
) -> None:
    def gaps() -> tuple[int, int]:
        status = core.statuses.get("r")
        assert status is not None
        return status.gap_steps, status.averages[0].gap_steps

    bad = {**_weights(3), "walk": torch.full_like(_weights(3)["walk"], math.nan)}
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    core.apply("r", 1, _weights(1))
    for step in (2, 3, 5):
        core.apply("r", step, bad)
    assert gaps() == (4, 4)
    core.apply("r", 6, _weights(6))

    assert gaps() == (4, 4), "nothing is counted twice"
    core.apply("r", 8, bad)
    assert gaps() == (6, 6)
    assert versions_by_average(core.publish("r"))["ema-0.9"].gap_steps == 4, "those before its step"
    core.apply("r", 8, _weights(8), mode="set")
    assert gaps() == (6, 6), "a counter never falls"
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(";")[0] for text in logged] == [
        "run r: NaN or Inf at step 2 in 1 tensors: walk",
        "run r: step 6 is applied",
        "run r: NaN or Inf at step 8 in 1 tensors: walk",
        "run r: step 8 is applied",
    ]


def test_refused_last_steps_are_gaps_after_a_restart(tmp_path: Path) -> None:
    bad = {**_weights(3), "walk": torch.full_like(_weights(3)["walk"], math.nan)}
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        core.apply("r", 1, _weights(1))
        core.apply("r", 3, bad)
        core.finish("r")
        before = core.statuses.get("r")
    with running_core(tmp_path) as core:
        after = core.statuses.get("r")

    assert before is not None
    assert after is not None
    for status in (before, after):
        assert (status.step, status.gap_steps, status.averages[0].gap_steps, status.quarantined) == (1, 2, 2, 1)


_BUFFERED_RULES = [
    "raw",
    "ema:0.5",
    "ema:0.5,buffers=copy,name=copied",
    "ema:0.5,acc=float64,name=exact",
    "window:2",
    "swa",
]


def _buffered(weight: float, mean: float, half: float = 1.0) -> dict[str, Tensor]:
    return {
        "w": torch.tensor([weight] * 3),
        "running_mean": torch.tensor([mean] * 5),
        "half": torch.tensor([half] * 3, dtype=torch.bfloat16),
    }


_BUFFERED = manifest_of(_buffered(0.0, 0.0), {"running_mean": Role.BUFFER, "half": Role.BUFFER})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_buffer_keeps_its_last_finite_value(
    core: ServerCore, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    """Compared with a run whose buffer does not change meanwhile: only `raw` holds what was sent."""
    for run in ("r", "oracle"):
        joined(core.join(run, _BUFFERED, _BUFFERED_RULES))
    steps = [(1, 1.0, 4.0), (2, 2.0, 4.0), (3, 3.0, bad), (4, 4.0, bad), (5, 5.0, 4.0), (6, 6.0, 8.0), (7, 7.0, 8.0)]
    for step, weight, mean in steps:
        assert core.apply("r", step, _buffered(weight, mean)) == Applied(step, frozenset())
        core.apply("oracle", step, _buffered(weight, mean if math.isfinite(mean) else 4.0))
        found = versions_by_average(core.publish("r"))
        expected = versions_by_average(core.publish("oracle"))
        for name, version in found.items():
            loaded, oracle = core.load(version), core.load(expected[name])
            assert torch.equal(loaded["w"], oracle["w"]), (step, name)
            if name == "raw" and not math.isfinite(mean):
                torch.testing.assert_close(loaded["running_mean"], torch.full((5,), mean), equal_nan=True)
            else:
                assert torch.equal(loaded["running_mean"], oracle["running_mean"]), (step, name)
    status = core.statuses.get("r")
    assert status is not None
    assert status.nonfinite_buffers == NonFiniteBuffers(("running_mean",), 3, 4, 2)
    assert (status.exempt, status.quarantined, status.gap_steps, status.applied) == ((), 0, 0, 7)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "run r: NaN or Inf at step 3 in 1 buffers, which stay at their last finite value: running_mean",
        "run r: all buffers are finite again at step 5, after 2 snapshots",
    ]


def test_average_added_during_a_nonfinite_buffer_copies_it_from_another(core: ServerCore) -> None:
    joined(core.join("r", _BUFFERED, ["raw", "ema:0.5"]))
    core.apply("r", 1, _buffered(1.0, 4.0, 2.0))
    for spec in ("swa", "window:2", "power:sigma_rel=0.1,acc=float64"):
        core.add("r", spec)
    core.apply("r", 2, _buffered(2.0, math.nan, math.inf))
    core.apply("r", 3, _buffered(3.0, 4.0, 2.0))

    for name, version in versions_by_average(core.publish("r")).items():
        loaded = core.load(version)
        assert loaded["running_mean"].tolist() == [4.0] * 5, name
        assert loaded["half"].tolist() == [2.0] * 3, name


def test_buffer_without_a_finite_value_is_copied_from_then_on(core: ServerCore) -> None:
    joined(core.join("r", _BUFFERED, ["raw"]))
    core.apply("r", 1, _buffered(1.0, 4.0))
    assert core.apply("r", 2, _buffered(2.0, math.nan)) == Applied(2, frozenset())
    core.add("r", "ema:0.5")

    assert core.apply("r", 3, _buffered(3.0, math.nan)) == Applied(3, frozenset({"running_mean"}))
    core.apply("r", 4, _buffered(4.0, 4.0))
    loaded = core.load(versions_by_average(core.publish("r"))["ema-0.5"])
    assert (loaded["running_mean"].tolist(), loaded["w"].tolist()) == ([4.0] * 5, [3.5] * 3)


def test_set_with_a_nonfinite_buffer_replaces_the_rest(core: ServerCore) -> None:
    joined(core.join("r", _BUFFERED, _BUFFERED_RULES))
    core.apply("r", 1, _buffered(1.0, 4.0))
    core.apply("r", 2, _buffered(5.0, math.nan), mode="set")

    for name, version in versions_by_average(core.publish("r")).items():
        loaded = core.load(version)
        assert loaded["w"].tolist() == [5.0] * 3, name
        if name != "raw":
            assert loaded["running_mean"].tolist() == [4.0] * 5, name


def test_nonfinite_parameter_is_refused_whatever_the_buffers_are(core: ServerCore) -> None:
    joined(core.join("r", _BUFFERED, ["ema:0.5"]))
    core.apply("r", 1, _buffered(1.0, 4.0))

    answer = core.apply("r", 2, _buffered(math.nan, math.nan))
    assert isinstance(answer, Quarantined)
    assert answer.text == "NaN or Inf at step 2 in 1 tensors: w"


def test_structural_buffers_are_copied_and_not_averaged(core: ServerCore) -> None:
    def model(value: float) -> dict[str, Tensor]:
        return {"w": torch.tensor([value]), "u": torch.tensor([value])}

    joined(core.join("r", manifest_of(model(0.0), {"u": Role.STRUCTURAL}), ["ema:0.5"]))
    core.apply("r", 1, model(0.0))
    core.apply("r", 2, model(1.0))

    loaded = core.load(versions_by_average(core.publish("r"))["ema-0.5"])
    assert (loaded["w"].item(), loaded["u"].item()) == (0.5, 1.0)


def test_slowly_changing_bfloat16_weights_are_followed(core: ServerCore) -> None:
    """An average kept in bfloat16 would not move at all here: each step is far below its resolution."""
    joined(core.join("r", manifest_of({"w": torch.zeros(4, dtype=torch.bfloat16)}), ["ema:0.999"]))
    core.apply("r", 1, {"w": torch.ones(4, dtype=torch.bfloat16)})
    for step in range(2, 202):
        core.apply("r", step, {"w": torch.full((4,), 1.25, dtype=torch.bfloat16)})

    loaded = core.load(versions_by_average(core.publish("r"))["ema-0.999"])
    torch.testing.assert_close(loaded["w"], torch.full((4,), 1.25 - 0.25 * 0.999**200), rtol=0, atol=1e-5)


def test_first_snapshot_below_the_origin_is_quarantined(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"], first_step=5))
    for step, mode in ((3, "set"), (3, "update"), (4, "update")):
        answer = core.apply("r", step, _weights(step), mode)  # type: ignore[arg-type]
        assert isinstance(answer, Quarantined)
        assert f"step {step} is not above step 4" in answer.text

    assert core.apply("r", 4, _weights(4), "set") == Applied(4, frozenset()), "weights before the first step"
    assert core.apply("r", 5, _weights(5)) == Applied(5, frozenset())
