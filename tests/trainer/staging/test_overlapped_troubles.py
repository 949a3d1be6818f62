"""A device that fails, has no room, or comes late, while snapshots are copied from it: training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from support.device_training import Carrying, RecordingWorker, Stamping, Training, client_on, stamp
from support.fake_device import FakeDevice, FakeStream
from support.waiting import eventually
from trainer_client import EmaClient
from trainer_client.staging import transfer


def test_failed_stream_wait_drops_the_snapshot_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training()
    training.attach()
    training.optimizer.step()

    def broken() -> None:
        raise RuntimeError("the device is broken")

    monkeypatch.setattr(training.device, "is_capturing", broken)
    training.client.before_weight_write()
    monkeypatch.undo()
    training.end()

    assert training.worker.steps == []
    assert training.client.stats()["torn"] == 1
    assert training.client.stats()["skipped"]["error"] == 1


def test_slots_that_cannot_be_pinned_log_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(slots=8)
    training.device.pin_problem = "out of memory"
    training.attach()

    training.train(3)
    training.end()

    assert [(record.levelno, "out of memory" in record.message) for record in caplog.records] == [
        (logging.WARNING, True)
    ]
    assert training.worker.torn == []
    assert training.worker.snapshots


def test_failed_copy_issue_drops_the_snapshot_and_frees_its_slot() -> None:
    training = Training()
    training.attach()
    training.device.fail_after = 5  # the scratch's copies and the first large one to the slot are issued

    training.optimizer.step()

    assert training.client.stats()["skipped"]["error"] == 1
    assert len(training.worker.free) == 2
    left = [bytes(slot.view) for slot in training.worker.slots]
    training.device.idle()
    assert [bytes(slot.view) for slot in training.worker.slots] == left
    training.device.fail_after = None
    training.optimizer.step()
    training.end()
    assert training.worker.steps == [2]


@pytest.mark.parametrize("answers", [True, False])
def test_failed_copy_wait_keeps_busy_memory_pinned(
    answers: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    training.attach()

    def broken(*_: object) -> None:
        raise RuntimeError("the device is broken")

    monkeypatch.setattr(training.device, "block_until", broken)
    if not answers:
        monkeypatch.setattr(FakeStream, "synchronize", broken)
    training.optimizer.step()

    def settled() -> bool:
        training.device.idle()
        return training.client.flush(timeout_s=0)

    eventually(settled, "the copy was abandoned")
    assert training.client.stats()["skipped"]["error"] == 1
    assert len(training.worker.free) == 2
    assert "the device is broken" in caplog.text
    issued = len(training.device.compute.work)
    training.client.before_weight_write()
    assert len(training.device.compute.work) == issued, "nothing is under way"
    training.client.close()
    assert len(training.device.pinned) == (0 if answers else 2)


def _strided() -> tuple[nn.Module, Tensor]:
    """A module whose one large parameter is not row-major, and the weights that it has."""
    module, weights = nn.Module(), torch.arange(120_000.0).view(300, 400)
    module.weight = nn.Parameter(weights.t())
    return module, weights.t()


@pytest.mark.parametrize(("what", "room"), [("scratch", -1), ("bounce", 1 << 20)])
def test_device_without_room_logs_one_warning_and_does_not_overlap(
    what: str, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    device, worker = FakeDevice(), RecordingWorker()
    device.room = room
    module, weights = _strided()
    optimizer = SGD(module.parameters(), lr=0.0)
    client = client_on(device, worker)

    client.attach(module, optimizer)
    for _ in range(3):
        optimizer.step()

    assert worker.steps == [1, 2, 3]
    assert all(torch.equal(snapshot["weight"], weights) for _, snapshot in worker.snapshots)
    assert len([nbytes for nbytes in device.allocated if nbytes > room]) == 1, "it is not requested again"
    assert client.stats()["skipped"]["error"] == 0
    assert ["CUDA out of memory" in record.message for record in caplog.records] == [True]


def test_device_failure_during_attach_does_not_raise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()

    def broken() -> None:
        raise RuntimeError("the device is broken")

    monkeypatch.setattr(training.device, "new_stream", broken)
    training.attach()

    assert ["the device is broken" in record.message for record in caplog.records] == [True]


class _Gated(FakeDevice):
    """A device whose copies to a slot can be issued only once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.at_gate, self.gate = threading.Event(), threading.Event()

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if self.current_stream() is not self.compute:
            self.at_gate.set()
            assert self.gate.wait(30)
        super().copy(targets, sources)


def _gated_training() -> tuple[_Gated, RecordingWorker, EmaClient, Carrying, threading.Thread]:
    """A training whose first step has been taken in another thread, which stands at the gate."""
    device, worker, model = _Gated(), RecordingWorker(), Carrying()
    client = client_on(device, worker)
    optimizer = Stamping(device, model.parameters(), noted=False)
    client.attach(model, optimizer)
    stamp(device, [model.seen], 1)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    assert device.at_gate.wait(30)
    return device, worker, client, model, thread


def test_unrecorded_event_of_another_thread_is_waited_for() -> None:
    device, worker, client, model, thread = _gated_training()
    other = Stamping(device, model.parameters(), noted=False, steps=70)
    stepped = threading.Event()

    def step() -> None:
        other.step()
        stepped.set()

    second = threading.Thread(target=step)
    second.start()

    assert not stepped.wait(0.2), "the event was not recorded: its waiter would have waited for nothing"
    device.gate.set()
    assert stepped.wait(30)
    thread.join(30)
    second.join(30)
    device.idle()
    assert client.flush(timeout_s=30)
    assert worker.torn == []
    assert worker.steps == [1]


def test_wait_for_an_event_that_is_never_recorded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_RECORDING_S", 0.01)
    device, worker, client, model, thread = _gated_training()

    client.before_weight_write()
    stamp(device, model.weights, 99)
    device.gate.set()
    thread.join(30)
    device.idle()

    assert client.flush(timeout_s=30)
    assert worker.steps == []
    assert client.stats()["torn"] == 1
