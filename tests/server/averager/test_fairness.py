"""A large run that is averaged, joined or read from the disk holds up no other run; its own jobs keep their order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from ema_server.averager import active_runs
from ema_server.averager import join as joining
from ema_server.averager.jobs import Applied, DeleteRun, Join, Joined, Publish, Unchanged, WhyNot
from ema_server.compute.kernel import Kernel
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core

_LARGE = 2 << 20
_BESIDE = 1 << 20  # elements of a run that is averaged beside a large one


def _weights(step: int, elements: int) -> dict[str, Tensor]:
    return {"w": torch.full((elements,), float(step))}


def _manifest(elements: int) -> Manifest:
    return manifest_of(_weights(1, elements))


class _Gate:
    """Makes a function wait where `is_closed` says so; `reached` is set once it does."""

    def __init__(self, function: Callable[..., Any], is_closed: Callable[..., bool]) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._function = function
        self._is_closed = is_closed

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return lambda *of, **named: self(instance, *of, **named)

    def __call__(self, *of: Any, **named: Any) -> Any:
        if self._is_closed(*of, **named):
            self.reached.set()
            assert self.opened.wait(WAIT_S)
        return self._function(*of, **named)


@contextmanager
def _gate(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, is_closed: Callable[..., bool]) -> Iterator[_Gate]:
    gate = _Gate(getattr(owner, name), is_closed)
    monkeypatch.setattr(owner, name, gate)
    try:
        yield gate
    finally:
        gate.opened.set()


@pytest.mark.parametrize("elements", [100, _BESIDE])
def test_snapshots_of_a_small_run_are_applied_while_a_large_one_is_averaged(
    tmp_path: Path, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("large", _manifest(_LARGE), ["ema:0.5"]))
        joined(core.join("small", _manifest(elements), ["ema:0.5"]))
        assert isinstance(core.apply("large", 1, _weights(1, _LARGE)), Applied)
        answers: queue.Queue[object] = queue.Queue()

        def is_large(_: Kernel, blocks: Any, targets: Any, *more: Any) -> bool:
            return bool(targets[0].data.numel() >= 4 * _LARGE)

        with _gate(monkeypatch, Kernel, "update", is_large) as gate:
            core.averager.submit(core.apply_job("large", 2, _weights(3, _LARGE), answers.put))
            assert gate.reached.wait(WAIT_S)
            for step in (1, 2, 3):
                assert isinstance(core.apply("small", step, _weights(step, elements)), Applied)
            assert answers.empty()
        assert isinstance(answers.get(timeout=WAIT_S), Applied)

        for run, expected in (("large", 2.0), ("small", 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3)):
            (version,) = durable(core.publish(run)).versions
            assert core.load(version)["w"].unique().tolist() == [expected]


def test_second_snapshot_of_the_large_run_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("large", _manifest(_LARGE), ["ema:0.5"]))
        answers: queue.Queue[Any] = queue.Queue()
        with _gate(monkeypatch, Kernel, "update", lambda *_: True) as gate:
            core.averager.submit(core.apply_job("large", 1, _weights(1, _LARGE), answers.put))
            assert gate.reached.wait(WAIT_S)
            core.averager.submit(core.apply_job("large", 2, _weights(2, _LARGE), answers.put))
            assert answers.empty()

        assert [answers.get(timeout=WAIT_S).step for _ in range(2)] == [1, 2]


def _restart(data: Path, run: str) -> None:
    with running_core(data) as core:
        joined(core.join(run, _manifest(100), ["ema:0.5"]))
        core.apply(run, 1, _weights(1, 100))


@pytest.mark.parametrize("is_restored", [False, True])
def test_join_of_a_large_run_holds_up_no_other_run(
    tmp_path: Path, is_restored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_restored:
        _restart(tmp_path, "large")
    with running_core(tmp_path) as core:
        sizes = {"small": 100, "medium": _LARGE}
        for run, elements in sizes.items():
            joined(core.join(run, _manifest(elements), ["ema:0.5"]))
        order: queue.Queue[tuple[str, Any]] = queue.Queue()
        owner, name = (active_runs, "load_run") if is_restored else (joining, "new_run")
        with _gate(monkeypatch, owner, name, lambda *_: True) as gate:
            core.averager.submit(_join("large", core, lambda answer: order.put(("join", answer))))
            assert gate.reached.wait(WAIT_S)
            core.averager.submit(Publish("large", "request", lambda answer: order.put(("publish", answer))))
            core.averager.submit(DeleteRun("large", lambda answer: order.put(("delete", answer))))
            for run, elements in sizes.items():
                assert isinstance(core.apply(run, 1, _weights(1, elements)), Applied)
                assert durable(core.publish(run)).step == 1
            assert order.empty()

        found = [order.get(timeout=WAIT_S) for _ in range(3)]
        assert [name for name, _ in found] == ["join", "publish", "delete"]
        answer, published, deleted = (answer for _, answer in found)
        assert isinstance(answer, Joined)
        assert answer.last_step == (1 if is_restored else None)
        assert durable(published).step == answer.last_step
        assert isinstance(deleted, Unchanged)
        assert deleted.why is WhyNot.STREAMING


def _join(run: str, core: ServerCore, reply: Callable[[Any], None]) -> Join:
    """The job of a JOIN, not submitted."""
    taken: list[Join] = []

    def take(job: Any) -> None:
        taken.append(job)
        job.reply(None)

    submit, core.averager.submit = core.averager.submit, take  # type: ignore[method-assign]
    try:
        core.join(run, _manifest(100), ["ema:0.5"], first_step=2)
    finally:
        core.averager.submit = submit  # type: ignore[method-assign]
    return Join(run, taken[0].join, reply)


def test_stop_waits_for_a_join_and_publishes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _restart(tmp_path, "large")
    core = ServerCore(tmp_path)
    core.start()
    answers: queue.Queue[Any] = queue.Queue()
    stopped: queue.Queue[bool] = queue.Queue()
    with _gate(monkeypatch, active_runs, "load_run", lambda *_: True) as gate:
        core.averager.submit(_join("large", core, answers.put))
        assert gate.reached.wait(WAIT_S)
        stopping = threading.Thread(target=lambda: stopped.put(core.stop()))
        stopping.start()
        assert stopped.empty()
    stopping.join(WAIT_S)

    assert stopped.get(timeout=WAIT_S)
    assert isinstance(answers.get(timeout=WAIT_S), Joined)
