"""A trainer that begins again and again leaves a bounded number of short runs; nothing of value is deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_server.averager.jobs import Applied
from ema_server.derived.store import Derivation
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core
from support.waiting import eventually

_KEPT, _SHORT = 3, 5


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((4,), float(step))}


_MANIFEST = manifest_of(_weights(1))


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path / "data", keep_short_runs=_KEPT, short_run_steps=_SHORT) as core:
        yield core


def _start(core: ServerCore, steps: int = 2, run: str = "r", reason: str = "request") -> None:
    """A trainer begins the run at step 0, and ends after some steps."""
    joined(core.join(run, _MANIFEST, ["raw"], resume="never"))
    for step in range(1, steps + 1):
        assert isinstance(core.apply(run, step, _weights(step)), Applied)
    durable(core.publish(run, reason))  # type: ignore[arg-type]
    core.leave(run)


def _dated(core: ServerCore, run: str = "r") -> list[str]:
    """The runs that were set aside, oldest first."""
    found = [status for status in core.statuses.all() if status.run.startswith(f"{run}.")]
    return [
        status.run for status in sorted(found, key=lambda status: (datetime.fromisoformat(status.created), status.run))
    ]


def test_newest_short_runs_are_kept_and_older_ones_deleted(core: ServerCore) -> None:
    seen: list[str] = []
    for _ in range(8):
        _start(core)
        seen += [run for run in _dated(core) if run not in seen]

    assert len(seen) == 7
    assert _dated(core) == seen[-_KEPT:]
    runs = core.data_dir.root / "runs"
    eventually(lambda: len(list(runs.iterdir())) == _KEPT + 1, "the files of the others are erased", WAIT_S)
    assert core.statuses.get("r") is not None


def _finish(core: ServerCore) -> None:
    joined(core.join("r", _MANIFEST, ["raw"], resume="never"))
    assert isinstance(core.apply("r", 1, _weights(1)), Applied)
    durable(core.finish("r"))


def _continue_dated(core: ServerCore) -> None:
    _start(core)
    _start(core)
    dated = _dated(core)[-1]
    joined(core.join(dated, _MANIFEST, ["raw"], first_step=3, resume="must"))
    assert isinstance(core.apply(dated, 3, _weights(3)), Applied)
    durable(core.publish(dated))
    core.leave(dated)


def _derive(core: ServerCore) -> None:
    _start(core)
    _start(core)
    what = Derivation(_dated(core)[-1], "best", "raw", 1, 1, 0, "synthesized", {})
    core.server.services.deriving.store.write(what, [b"weights"], None)


@pytest.mark.parametrize(
    "make",
    [
        lambda core: _start(core, steps=_SHORT),
        lambda core: _start(core, reason="checkpoint"),
        _finish,
        _continue_dated,
        _derive,
    ],
    ids=["long", "checkpoint", "finished", "continued", "derived"],
)
def test_run_of_value_is_never_deleted(core: ServerCore, make: Callable[[ServerCore], None]) -> None:
    make(core)
    before = set(_dated(core))
    _start(core)
    valued = _dated(core)[-1] if not before else next(iter(before))
    for _ in range(_KEPT + 3):
        _start(core)

    assert valued in _dated(core)


def test_run_that_is_read_is_deleted_at_a_later_start(core: ServerCore) -> None:
    _start(core)
    _start(core)
    (held,) = _dated(core)
    with core.catalog.hold(core.catalog.versions(held, "raw")[0]):
        for _ in range(_KEPT + 2):
            _start(core)
        assert held in _dated(core)


def test_runs_that_a_user_named_like_dated_ones_and_those_of_other_names_stay(core: ServerCore) -> None:
    mine, other = "r.20260101T000000Z", "s.20260101T000000Z"
    for run in (mine, other):
        _start(core, run=run)
    for _ in range(_KEPT + 3):
        _start(core)

    assert {mine, other} <= {status.run for status in core.statuses.all()}


def test_zero_steps_keep_every_run(tmp_path: Path) -> None:
    with running_core(tmp_path / "data", keep_short_runs=1, short_run_steps=0) as core:
        for _ in range(5):
            _start(core)
        assert len(_dated(core)) == 4


def test_broken_short_run_is_kept(core: ServerCore) -> None:
    _start(core)
    _start(core)
    (broken,) = _dated(core)
    (core.catalog.generations(broken)[0].folder / "generation.json").write_text("{}")
    for _ in range(_KEPT + 2):
        _start(core)

    assert core.data_dir.has_folder(broken)
