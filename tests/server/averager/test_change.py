"""Averages are added and removed while a run streams; an answered change survives a restart, a failed one is undone."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_proto.names import is_chosen
from ema_server.averager.jobs import (
    AddAverage,
    Applied,
    Changed,
    Failed,
    Refused,
    RemoveAverage,
    Rewound,
    Unchanged,
    WhyNot,
)
from support.oracle import bound, largest_difference, replay
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.sin(torch.arange(30.0) * step), "seen": torch.tensor(step)}


_MANIFEST = manifest_of(_weights(1))


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


def _stream(core: ServerCore, *steps: int) -> None:
    for step in steps:
        assert isinstance(core.apply("r", step, _weights(step)), Applied)


def _names(core: ServerCore) -> list[str]:
    status = core.statuses.get("r")
    assert status is not None
    return [average.name for average in status.averages]


def _ledger(core: ServerCore, average: str) -> dict[str, Any]:
    version = core.catalog.find("r", average, "latest")
    assert version is not None
    ledger: dict[str, Any] = json.loads((version.folder / "version.json").read_text())["ledger"]
    return ledger


def _check(core: ServerCore, average: str, decay: float) -> None:
    version = versions_by_average(core.publish("r"))[average]
    ledger = _ledger(core, average)
    assert largest_difference(replay(ledger, decay, _weights), core.load(version)) <= bound(ledger, decay, 1.0)


def test_added_average_begins_with_the_next_snapshot(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    _stream(core, 1, 2, 3)

    assert core.add("r", "ema:0.5") == Changed("ema-0.5")
    assert _names(core) == ["ema-0.9", "ema-0.5"]
    assert [version.average for version in durable(core.publish("r")).versions] == ["ema-0.9"]
    _stream(core, 6, 7)
    _check(core, "ema-0.5", 0.5)
    _check(core, "ema-0.9", 0.9)
    assert _ledger(core, "ema-0.5") == {"origin": 3, "set": [6], "ranges": [[6, 7, 1]]}
    added, status = core.catalog.find("r", "ema-0.5", "latest"), core.statuses.get("r")
    assert added is not None
    assert status is not None
    assert (added.updates, added.gap_steps, status.gap_steps) == (2, 0, 2)


def test_added_average_survives_a_restart_before_its_first_snapshot(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        _stream(core, 1, 2)
        durable(core.publish("r"))
        assert isinstance(core.add("r", "window:2"), Changed)
        core.leave("r", lost=True)
    with running_core(tmp_path) as core:
        assert _names(core) == ["ema-0.9", "window-2"]
        joined(core.join("r", _MANIFEST, ["ema:0.9"], first_step=3))
        _stream(core, 3, 4, 5)
        loaded = core.load(versions_by_average(core.publish("r"))["window-2"])
        torch.testing.assert_close(loaded["w"], (_weights(4)["w"] + _weights(5)["w"]) / 2)
        _check(core, "ema-0.9", 0.9)


def test_removed_average_keeps_its_versions(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "window:5"]))
    _stream(core, 1, 2)
    before = versions_by_average(core.publish("r"))["window-5"]
    memory = core.statuses.get("r")

    assert core.remove("r", "window-5") == Changed("window-5")
    assert _names(core) == ["ema-0.9"]
    after = core.statuses.get("r")
    assert memory is not None
    assert after is not None
    assert after.memory_bytes < memory.memory_bytes - 5 * _MANIFEST.nbytes
    assert core.catalog.find("r", "window-5", "latest") == before
    _stream(core, 3)
    assert list(versions_by_average(core.publish("r"))) == ["ema-0.9"]
    _check(core, "ema-0.9", 0.9)


def test_first_average_can_be_removed(core: ServerCore) -> None:
    """The steps of a run and its acknowledgements depend on no single average."""
    joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"]))
    _stream(core, 1, 2)
    assert isinstance(core.remove("r", "ema-0.9"), Changed)
    assert isinstance(core.add("r", "swa"), Changed)

    assert isinstance(core.apply("r", 2, _weights(99)), Applied)
    answer = joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"], first_step=3, reconnect=True))
    assert (answer.last_step, answer.recent) == (2, (1, 2))
    _stream(core, 3)
    _check(core, "ema-0.5", 0.5)


def test_trainer_may_join_with_a_removed_average(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"]))
        _stream(core, 1)
        assert isinstance(core.remove("r", "ema-0.9"), Changed)
        joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"], first_step=2, reconnect=True))
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"], first_step=2))
        assert _names(core) == ["ema-0.5"]
        answer = core.join("r", _MANIFEST, ["ema:0.99"], first_step=2)
        assert isinstance(answer, Refused)
        assert "has no average 'ema-0.99'" in answer.text
        answer = core.join("r", _MANIFEST, ["ema:0.8,name=ema-0.9"], first_step=2)
        assert isinstance(answer, Refused)


def test_removed_name_can_be_added_again(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5,name=short"]))
    _stream(core, 1, 2)
    assert isinstance(core.remove("r", "short"), Changed)
    assert isinstance(core.add("r", "ema:0.6,name=short"), Changed)
    _stream(core, 3, 4)

    _check(core, "short", 0.6)
    joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5,name=short"], first_step=5, reconnect=True))
    joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.6,name=short"], first_step=5, reconnect=True))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("ema:0.9", "has an average 'ema-0.9': remove it first"),
        ("swa:name=EMA-0.9", "has an average 'EMA-0.9': remove it first"),
        ("ema:half_life_samples=1000", "needs to know samples per step"),
    ],
)
def test_refused_addition_says_what_to_do(core: ServerCore, spec: str, text: str) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "raw"]))
    _stream(core, 1)

    answer = core.add("r", spec)
    assert isinstance(answer, Unchanged)
    assert answer.why is WhyNot.CONFLICT
    assert text in answer.text
    assert _names(core) == ["ema-0.9", "raw"]


def test_run_has_at_most_64_averages(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, [f"ema:0.9,name=a{index}" for index in range(64)]))
    _stream(core, 1)

    answer = core.add("r", "raw")
    assert isinstance(answer, Unchanged)
    assert "has 64 averages, the most that a run may have" in answer.text


def test_patterns_of_added_averages_count_with_existing_ones(core: ServerCore) -> None:
    """Each is compared with each name, while every trainer waits."""
    joined(core.join("r", _MANIFEST, ["ema:0.9,name=a,include=" + "|".join(["w"] * 200)]))
    _stream(core, 1)

    refused = core.add("r", f"ema:0.9,name=b,exclude={'|'.join(['w'] * 57)}")
    assert isinstance(refused, Unchanged)
    assert "the run's averages have 257 patterns: use 256 at most" in refused.text
    assert core.add("r", f"ema:0.9,name=b,exclude={'|'.join(['w'] * 56)}") == Changed("b")


def test_change_matches_only_the_patterns_of_the_added_average(
    core: ServerCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9,include=w*,name=c", "ema:0.8,exclude=w*,name=d"]))
    _stream(core, 1)
    asked: list[Sequence[str]] = []

    def chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
        asked.append(include)
        return is_chosen(name, include, exclude)

    monkeypatch.setattr("ema_server.tensors.selection.is_chosen", chosen)
    assert core.add("r", "ema:0.7,name=b,include=w") == Changed("b")
    assert core.remove("r", "b") == Changed("b")
    assert set(asked) == {("w",)}
    assert len(asked) <= len(_MANIFEST.tensors)


def test_average_that_does_not_fit_is_refused_and_the_run_continues(
    core: ServerCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    _stream(core, 1)
    monkeypatch.setattr("ema_server.compute.memory.available_bytes", lambda: 10)

    answer = core.add("r", "window:3")
    assert isinstance(answer, Unchanged)
    assert answer.why is WhyNot.OUT_OF_MEMORY
    assert f"needs {4 * _MANIFEST.nbytes} bytes of memory" in answer.text
    _stream(core, 2)
    _check(core, "ema-0.9", 0.9)


def test_averages_change_only_while_a_run_streams(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "raw"]))
    early = core.add("r", "swa")
    assert isinstance(early, Unchanged)
    assert "has had no snapshot yet" in early.text
    _stream(core, 1)
    durable(core.finish("r"))

    for answer in (core.add("r", "swa"), core.remove("r", "raw"), core.add("unknown", "swa")):
        assert isinstance(answer, Unchanged)
        assert answer.why is WhyNot.NOT_STREAMING


def test_last_average_with_weights_cannot_be_removed(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9"]))
    _stream(core, 1)
    assert isinstance(core.add("r", "swa"), Changed)

    answer = core.remove("r", "ema-0.9")
    assert isinstance(answer, Unchanged)
    assert "is the only one of run 'r' that has weights" in answer.text
    _stream(core, 2)
    assert isinstance(core.remove("r", "ema-0.9"), Changed)
    missing = core.remove("r", "ema-0.9")
    assert isinstance(missing, Unchanged)
    assert (missing.why, missing.text) == (
        WhyNot.NO_SUCH_AVERAGE,
        "run 'r' has no average 'ema-0.9': it has swa",
    )


def test_change_that_cannot_be_made_durable_is_undone(core: ServerCore, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(core.join("r", _MANIFEST, ["ema:0.9", "raw"]))
    _stream(core, 1, 2)
    durable(core.publish("r"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ema_server.publishing.commit.write_durably", fail)
        for answer in (core.add("r", "swa"), core.remove("r", "raw")):
            assert isinstance(answer, Unchanged)
            assert answer.why is WhyNot.NOT_DURABLE
            assert "No space left on device" in answer.text
            assert _names(core) == ["ema-0.9", "raw"]
    _stream(core, 3)
    assert set(versions_by_average(core.publish("r"))) == {"ema-0.9", "raw"}
    assert isinstance(core.remove("r", "raw"), Changed)
    _check(core, "ema-0.9", 0.9)


def test_rewind_keeps_the_current_set_of_averages(tmp_path: Path) -> None:
    """Back at step 2: one added since starts over, one removed since stays removed, one added again is a new one."""
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5", "ema:0.7"]))
        _stream(core, 1, 2)
        durable(core.publish("r", "checkpoint"))
        _stream(core, 3)
        assert isinstance(core.remove("r", "ema-0.5"), Changed)
        assert isinstance(core.remove("r", "ema-0.7"), Changed)
        assert isinstance(core.add("r", "ema:0.7"), Changed)
        assert isinstance(core.add("r", "swa"), Changed)
        _stream(core, 4)
        assert not isinstance(core.rewind("r", 2), Failed)
        assert _names(core) == ["ema-0.9", "ema-0.7", "swa"]
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9", "ema:0.5"], first_step=3))
        _stream(core, 3, 4)
        _check(core, "ema-0.9", 0.9)
        _check(core, "ema-0.7", 0.7)
        assert _ledger(core, "ema-0.9")["set"] == [1]
        assert _ledger(core, "ema-0.7") == {"origin": 2, "set": [3], "ranges": [[3, 4, 1]]}
        assert _ledger(core, "swa") == {"origin": 2, "set": [3], "ranges": [[3, 4, 1]]}


def test_rewind_before_all_averages_began(tmp_path: Path) -> None:
    """At step 2 there was only an average that has been removed: the run has no weights there, and starts over."""
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9"]))
        _stream(core, 1, 2)
        durable(core.publish("r", "checkpoint"))
        assert isinstance(core.add("r", "ema:0.5"), Changed)
        _stream(core, 3)
        assert isinstance(core.remove("r", "ema-0.9"), Changed)
        back = core.rewind("r", 2)
        assert isinstance(back, Rewound)
        assert (back.step, back.recent) == (2, (1, 2))
        assert durable(core.publish("r")).versions == ()
    with running_core(tmp_path) as core:
        answer = joined(core.join("r", _MANIFEST, ["ema:0.9"], first_step=3))
        assert (answer.last_step, answer.continuation) == (2, "continued")
        _stream(core, 3, 4)
        _check(core, "ema-0.5", 0.5)


def test_concurrent_changes_are_all_made(core: ServerCore) -> None:
    """None waits for the previous one: later ones are part of the next generation."""
    joined(core.join("r", _MANIFEST, ["ema:0.9", "raw"]))
    _stream(core, 1)
    answers: queue.Queue[Changed | Unchanged] = queue.Queue()
    for rule in ("ema:0.5", "swa", "window:2"):
        core.averager.submit(AddAverage("r", parse_average(rule), answers.put))
    core.averager.submit(RemoveAverage("r", "raw", answers.put))
    core.averager.submit(RemoveAverage("r", "swa", answers.put))

    changed = [answers.get(timeout=30) for _ in range(5)]
    assert all(isinstance(answer, Changed) for answer in changed), changed
    assert _names(core) == ["ema-0.9", "ema-0.5", "window-2"]
    _stream(core, 2, 3)
    assert set(versions_by_average(core.publish("r"))) == {"ema-0.9", "ema-0.5", "window-2"}
