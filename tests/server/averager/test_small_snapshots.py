"""A small snapshot that finds nothing else to do is applied by the thread that submits it, in order, without files."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from ema_server.averager import active_run
from ema_server.averager.jobs import Applied, Publish
from ema_server.compute.pool import INLINE_BYTES
from ema_server.publishing.writer import GenerationWriter
from support.server_core import WAIT_S, ServerCore, manifest_of, running_core, versions_by_average
from support.waiting import eventually

_SMALL = INLINE_BYTES // 4 - 8


def _weights(step: int, elements: int = _SMALL) -> dict[str, Tensor]:
    return {"w": torch.sin(torch.arange(elements) + float(step))}


_MANIFEST = manifest_of(_weights(1))


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path) as core:
        yield core


def _submit(core: ServerCore, step: int, elements: int = _SMALL) -> list[tuple[Any, int]]:
    """Submit a snapshot; returns its answers, each with the thread that gave it. They may still come."""
    answers: list[tuple[Any, int]] = []
    core.averager.submit(
        core.apply_job("r", step, _weights(step, elements), lambda a: answers.append((a, threading.get_ident())))
    )
    return answers


def _join(core: ServerCore, manifest: Manifest = _MANIFEST) -> None:
    core.join("r", manifest, ["raw", "ema:0.9"])
    _wait_until_idle(core)


def _wait_until_idle(core: ServerCore) -> None:
    """The averager's thread marks a job as dealt with after it has answered it."""
    eventually(lambda: core.averager._queue.is_idle or None, "an idle averager", WAIT_S, every_s=0.001)


def test_snapshot_is_answered_before_submit_returns(core: ServerCore) -> None:
    _join(core)
    for step in range(1, 30):
        assert _submit(core, step) == [(Applied(step, frozenset()), threading.get_ident())]

    expected = _weights(1)["w"].double()
    for step in range(2, 30):
        expected += 0.1 * (_weights(step)["w"].double() - expected)
    version = versions_by_average(core.publish("r"))["ema-0.9"]
    assert version.step == 29
    # One update rounds by at most eps * (1 + 8 w) of the largest value, 1; the errors before it shrink by 1 - w.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(core.load(version)["w"].double(), expected, rtol=0, atol=eps * (1 + 0.8) / 0.1)


def test_larger_snapshot_is_left_to_the_averagers_thread(core: ServerCore) -> None:
    _join(core, manifest_of(_weights(1, INLINE_BYTES // 4 + 1)))
    answered: queue.Queue[int] = queue.Queue()
    job = core.apply_job("r", 1, _weights(1, INLINE_BYTES // 4 + 1), lambda _: answered.put(threading.get_ident()))
    core.averager.submit(job)

    assert answered.get(timeout=WAIT_S) != threading.get_ident()


def test_snapshot_waits_for_the_jobs_before_it(core: ServerCore) -> None:
    _join(core)
    _submit(core, 1)
    occupied, release, order = threading.Event(), threading.Event(), queue.Queue[str]()

    def occupy(_: object) -> None:
        occupied.set()
        release.wait(WAIT_S)
        order.put("publish")

    core.averager.submit(Publish("no-such-run", "request", occupy))
    assert occupied.wait(WAIT_S)
    core.averager.submit(core.apply_job("r", 2, _weights(2), lambda _: order.put("apply")))
    assert order.empty()

    release.set()
    assert [order.get(timeout=WAIT_S), order.get(timeout=WAIT_S)] == ["publish", "apply"]


def test_generation_that_becomes_due_is_written_by_the_averagers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_core(tmp_path, publish_every_steps=2) as core:
        opened: list[int] = []

        def open_writer(*args: Any) -> GenerationWriter:
            opened.append(threading.get_ident())
            return GenerationWriter(*args)

        monkeypatch.setattr(active_run, "GenerationWriter", open_writer)
        _join(core)
        for step in (1, 2):
            assert _submit(core, step)[0][1] == threading.get_ident()
        core.settled("r", lambda status: status.published_step == 2)

        assert opened
        assert threading.get_ident() not in opened
