"""Runs continue after a restart, a rewind, or a rerun under the same name, and equal the replay of their ledger."""

from __future__ import annotations

import json
import math
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_proto.errors import RejectCode
from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Applied, Failed, Refused, Rewound
from ema_server.publishing.commit import Content, commit
from ema_server.publishing.writer import GenerationWriter
from ema_server.runs.status_store import RunState
from ema_server.storage.catalog import Generation
from ema_server.storage.records import GenerationInfo
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core, versions_by_average


@cache
def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.rand(50, generator=generator),
        "d": torch.rand(9, generator=generator, dtype=torch.float64),
        "h": torch.rand(5, generator=generator).bfloat16(),
        "seen": torch.tensor(step),
    }


_MANIFEST = manifest_of(_weights(1))
_AVERAGES = ["raw", "ema:0.9"]


def _join(core: ServerCore, first_step: int = 1, *, reconnect: bool = False) -> tuple[str, int | None, int | None]:
    answer = joined(core.join("r", _MANIFEST, _AVERAGES, first_step=first_step, reconnect=reconnect))
    return answer.continuation, answer.last_step, answer.published_step


def _apply(core: ServerCore, *steps: int) -> None:
    for step in steps:
        assert isinstance(core.apply("r", step, _weights(step)), Applied)


def _state(core: ServerCore) -> RunState:
    status = core.statuses.get("r")
    assert status is not None
    return status.state


def _check(core: ServerCore, steps: list[int]) -> None:
    """The run's average, published now, is the replay of exactly these steps."""
    version = versions_by_average(core.publish("r"))["ema-0.9"]
    ledger = json.loads((version.folder / "version.json").read_text())["ledger"]
    assert ledger_steps(ledger) == steps
    assert largest_difference(replay(ledger, 0.9, _weights), core.load(version)) <= bound(ledger, 0.9, 1.0)


def test_restarted_server_continues_bit_for_bit(tmp_path: Path) -> None:
    """One server with a restart in the middle publishes the same ids, that is the same bytes, as one without."""
    ids = []
    for restarts in (False, True):
        data = tmp_path / str(restarts)
        with running_core(data) as core:
            _join(core)
            _apply(core, 1, 2, 3)
            if not restarts:
                _apply(core, 4, 7)
                ids.append([version.id for version in durable(core.publish("r")).versions])
        if restarts:
            with running_core(data) as core:
                assert _join(core, 4, reconnect=True) == ("continued", 3, 3)
                _apply(core, 4, 7)
                ids.append([version.id for version in durable(core.publish("r")).versions])

    assert ids[0] == ids[1]


def test_statuses_and_catalog_list_every_run_after_a_restart(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1, 3)
        durable(core.publish("r"))
        before = core.statuses.get("r")
    with running_core(tmp_path) as core:
        after = core.statuses.get("r")
        assert before is not None
        assert after is not None
        assert (after.state, after.memory_bytes, after.steps_per_second) == (RunState.WAITING, 0, None)
        for field in ("created", "step", "published_step", "first_step", "applied", "gap_steps", "averages", "exempt"):
            assert getattr(after, field) == getattr(before, field), field
        assert core.catalog.averages("r") == ("raw", "ema-0.9")


def test_exempt_tensors_stay_exempt_after_a_restart(tmp_path: Path) -> None:
    def masked(step: int) -> dict[str, Tensor]:
        return {"w": torch.tensor([float(step)]), "mask": torch.tensor([-math.inf, float(step)])}

    manifest = manifest_of(masked(1), {"mask": Role.BUFFER})
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest))
        core.apply("r", 1, masked(1))
    with running_core(tmp_path) as core:
        assert joined(core.join("r", manifest, first_step=2)).exempt == {"mask"}
        assert isinstance(core.apply("r", 2, masked(2)), Applied)
        assert torch.equal(core.load(versions_by_average(core.publish("r"))["ema-0.9"])["mask"], masked(2)["mask"])


def test_rejoin_may_change_every_and_config_but_not_roles(tmp_path: Path) -> None:
    frozen = manifest_of(_weights(1), {"w": Role.FROZEN})
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _AVERAGES, config='{"width": 1}\r\n'))
        _apply(core, 1, 2)
        first = versions_by_average(core.publish("r"))["raw"]
        again = joined(core.join("r", frozen, ["raw"], first_step=3, every=2, config='{"width": 2}'))
        assert again.manifest == _MANIFEST
        status = core.statuses.get("r")
        assert status is not None
        assert status.every == 2
        _apply(core, 4)
        second = versions_by_average(core.publish("r"))["raw"]
        assert (first.folder / "config.json").read_bytes() == b'{"width": 1}\r\n'
        assert (second.folder / "config.json").read_bytes() == b'{"width": 2}'
        assert {file.name for file in second.files} == {"model.safetensors", "config.json", "version.json"}
        assert joined(core.join("r", _MANIFEST, first_step=5)).continuation == "continued"
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, first_step=5))
        _apply(core, 5)
        third = versions_by_average(core.publish("r"))["raw"]
        assert (third.folder / "config.json").read_bytes() == b'{"width": 2}', "a config outlives a restart"


@pytest.mark.parametrize("restart", [False, True])
def test_trainer_that_starts_earlier_rewinds_the_run(tmp_path: Path, restart: bool) -> None:
    core = ServerCore(tmp_path)
    core.start()
    _join(core)
    for step in (10, 20, 30):
        _apply(core, step)
        durable(core.publish("r"))
    _apply(core, 35)
    if restart:
        core.stop()
        core = ServerCore(tmp_path)
        core.start()
    try:
        assert _join(core, 26) == ("rewound", 20, 20)
        assert core.apply("r", 20, _weights(20)) == Applied(20, frozenset()), "a step of the past is acknowledged"
        _apply(core, 26, 40)
        _check(core, [10, 20, 26, 40])
    finally:
        core.stop()


@pytest.mark.parametrize("first_step", [2, 7, 20])
def test_rewind_far_beyond_the_newest_generations_leaves_a_gap(tmp_path: Path, first_step: int) -> None:
    """The server does not know of its checkpoint; the average is exact over the remaining steps and the new one."""
    with running_core(tmp_path, keep_generations=2) as core:
        _join(core)
        for step in range(1, 31):
            _apply(core, step)
            durable(core.publish("r"))
        continuation, last_step, _ = _join(core, first_step)
        assert continuation == "rewound"
        assert last_step is not None
        assert 1 <= last_step < first_step
        _apply(core, first_step)
        _check(core, [*range(1, last_step + 1), first_step])
        status = core.statuses.get("r")
        assert status is not None
        assert status.gap_steps == first_step - 1 - last_step


def test_rewind_survives_a_restart_with_later_steps_on_disk(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=10) as core:
        _join(core)
        for step in (10, 20, 30):
            _apply(core, step)
            durable(core.publish("r"))
        before = core.catalog.find("r", "raw", "step-20")
        assert core.rewind("r", 29) == Rewound(20, (10, 20))
        after = core.catalog.find("r", "raw", "latest")
        assert before is not None
        assert after is not None
        assert (after.id, after.step) == (before.id, 20)
        status = core.statuses.get("r")
        assert status is not None
        assert (status.step, status.published_step, status.applied) == (20, 20, 2)
    with running_core(tmp_path, keep_generations=10) as core:
        assert _join(core, 21) == ("continued", 20, 20)
        _apply(core, 25)
        _check(core, [10, 20, 25])
        assert core.rewind("r", 24) == Rewound(20, (10, 20))
        assert core.rewind("r", 15) == Rewound(10, (10,))
        assert isinstance(core.rewind("r", 9), Failed)
        _apply(core, 11)
        _check(core, [10, 11])


def test_step_published_again_after_a_rewind_is_a_new_version(tmp_path: Path) -> None:
    with running_core(tmp_path, keep_generations=10) as core:
        _join(core)
        _apply(core, 1, 2)
        durable(core.publish("r"))
        _apply(core, 3)
        old = versions_by_average(core.publish("r"))["raw"]
        core.rewind("r", 2)
        core.apply("r", 3, _weights(99))
        new = versions_by_average(core.publish("r"))["raw"]

        assert old.id != new.id
        assert core.catalog.find("r", "raw", "step-3") == new
        assert core.catalog.find("r", "raw", old.id) == old
        assert len(core.catalog.versions("r", "raw")) == 3, "the version that was rewound to is listed once"


def test_rewind_to_the_current_step_publishes_and_changes_nothing(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        assert isinstance(core.rewind("r", 5), Failed), "there is nothing yet"
        _apply(core, 1, 2)
        assert core.rewind("r", 7) == Rewound(2, (1, 2))
        assert core.catalog.generations("r")[0].step == 2


def test_rewind_without_an_older_generation_fails_and_keeps_the_run(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 5, 6)
        answer = core.rewind("r", 5)
        assert isinstance(answer, Failed)
        assert "no generation at or before step 5" in answer.text
        _apply(core, 7)
        _check(core, [5, 6, 7])


def test_resume_never_sets_the_old_run_aside_with_its_last_state(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1, 2)
        durable(core.publish("r"))
        _apply(core, 3)
        other = manifest_of({"new": torch.zeros(3)})
        answer = joined(core.join("r", other, ["ema:0.5"], resume="never"))
        assert (answer.continuation, answer.last_step, answer.published_step) == ("new", None, None)
        (aside,) = [name for name in core.catalog.runs() if name != "r"]
        assert aside.startswith("r.20")
        latest = core.catalog.find(aside, "ema-0.9", "latest")
        assert latest is not None
        assert (latest.run, latest.step) == (aside, 3)
        assert set(core.load(latest)) == set(_weights(1))
        core.apply("r", 1, {"new": torch.ones(3)})
        durable(core.publish("r"))
    with running_core(tmp_path) as core:
        assert {status.run: status.step for status in core.statuses.all()} == {"r": 1, aside: 3}
        back = joined(core.join(aside, _MANIFEST, _AVERAGES, first_step=4))
        assert (back.continuation, back.last_step) == ("continued", 3)


def test_resume_never_twice_in_one_second_keeps_both_runs(tmp_path: Path) -> None:
    name = "n" * 96
    with running_core(tmp_path, wall=lambda: 1_750_000_000.0) as core:
        for _ in range(3):
            joined(core.join(name, _MANIFEST, resume="never"))
            core.apply(name, 1, _weights(1))

        core.publish(name)
        assert len(core.catalog.runs()) == 3
        assert max(len(run) for run in core.catalog.runs()) == 96


def test_finished_run_stays_finished_and_can_be_continued(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1, 2)
        assert durable(core.finish("r")).new
        status = core.settled("r", lambda status: status.memory_bytes == 0)
        assert status.state is RunState.FINISHED
    with running_core(tmp_path) as core:
        assert _state(core) is RunState.FINISHED
        assert _join(core, 3) == ("continued", 2, 2)
        assert _state(core) is RunState.ACTIVE
        _apply(core, 3)
        _check(core, [1, 2, 3])


def test_finishing_a_published_run_adds_no_version(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1)
        published = durable(core.publish("r"))
        finished = durable(core.finish("r"))

        assert not finished.new
        assert [version.id for version in finished.versions] == [version.id for version in published.versions]
    with running_core(tmp_path) as core:
        assert _state(core) is RunState.FINISHED


def test_run_without_a_snapshot_can_be_finished(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        assert durable(core.finish("r")).step is None
        assert core.settled("r", lambda status: status.state is RunState.FINISHED).step is None


@pytest.mark.parametrize("lost", [False, True])
def test_run_is_published_and_freed_when_its_trainer_leaves(tmp_path: Path, lost: bool) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1, 2)
        core.leave("r", lost=lost)
        status = core.settled("r", lambda status: status.memory_bytes == 0)
        assert status.state is (RunState.LOST if lost else RunState.WAITING)
        assert status.published_step == 2
        assert _join(core, 3, reconnect=True) == ("continued", 2, 2)
        _apply(core, 3)
        _check(core, [1, 2, 3])


def test_run_without_a_snapshot_leaves_nothing(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        core.leave("r")
        assert _join(core, 1)[0] == "new"
        core.leave("r")
        assert isinstance(core.publish("r"), Failed)
        assert core.statuses.get("r") is None


def test_rewind_waits_for_the_generation_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(draft: GenerationWriter, content: Content, info: GenerationInfo) -> Generation:
        begun.set()
        go_on.wait(WAIT_S)
        return commit(draft, content, info)

    monkeypatch.setattr("ema_server.publishing.publisher.commit", slowly)
    with running_core(tmp_path) as core:
        _join(core)
        _apply(core, 1)
        core.leave("r")
        assert begun.wait(WAIT_S)
        assert _join(core, first_step=2, reconnect=True) == ("continued", 1, None)
        _apply(core, 2, 3)
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        assert _join(core, first_step=2) == ("rewound", 1, 1)
        timer.join(WAIT_S)


def test_two_runs_are_independent(tmp_path: Path) -> None:
    other = manifest_of({"x": torch.zeros(2)})
    with running_core(tmp_path) as core:
        _join(core)
        joined(core.join("s", other, ["ema:0.5"]))
        for step in (1, 2, 3):
            _apply(core, step)
            core.apply("s", step * 10, {"x": torch.full((2,), float(step))})
        _check(core, [1, 2, 3])
        loaded = core.load(versions_by_average(core.publish("s"))["ema-0.5"])
        expected = 1 * 0.5**20 + 2 * (1 - 0.5**10) * 0.5**10 + 3 * (1 - 0.5**10)
        torch.testing.assert_close(loaded["x"], torch.full((2,), expected))


def test_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    huge = manifest_of({"w": torch.empty(1 << 46, dtype=torch.float32, device="meta")})
    with running_core(tmp_path) as core:
        answer = core.join("r", huge, ["ema:0.9", "raw"])
        assert isinstance(answer, Refused)
        assert answer.code is RejectCode.OUT_OF_MEMORY
        assert f"2 averages of this model need {2 * 4 << 46} bytes" in answer.text
        assert _join(core)[0] == "new", "the name is free"


def test_run_whose_folder_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        (tmp_path / "runs" / "r").write_text("in the way")
        answer = core.join("r", _MANIFEST)
        assert isinstance(answer, Refused)
        assert answer.code is RejectCode.UNAVAILABLE
        assert "disk" in answer.text


def test_name_of_another_run_in_other_case_is_refused(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        _join(core)
        refused = core.join("R", _MANIFEST, _AVERAGES)

        assert isinstance(refused, Refused)
        assert refused.code is RejectCode.BAD_RUN
        assert refused.text == (
            "run 'R' differs from run 'r' only in case, and some file systems confuse the two: take another name"
        )
        joined(core.join("R2", _MANIFEST, _AVERAGES))
        _apply(core, 1)
