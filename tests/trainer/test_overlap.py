"""Copying while training goes on, on a device whose time the test keeps: what a snapshot holds, who waits for whom."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD

from support.device_training import Carrying, RecordingWorker, Stamping, client_on, note_write, stamp, train
from support.fake_device import FakeDevice, FakeEvent, FakeStream
from support.processes import eventually
from trainer_client import EmaClient, RewindError, SettingsError, overlap
from trainer_client.hooks import Attachment
from trainer_client.overlap import OverlappedStager
from trainer_client.routes import plan_routes
from trainer_client.stagers import Stagers

STEPS = 20


class Training:
    """A client attached to a model on a fake device."""

    made: ClassVar[list[Training]] = []

    def __init__(self, *, noted: bool = True, slots: int = 2, **given: Any) -> None:
        self.device = FakeDevice()
        self.worker = RecordingWorker(slots)
        self.model = Carrying()
        self.optimizer = Stamping(self.device, self.model.parameters(), noted=noted)
        self.client = client_on(self.device, self.worker, **given)
        self.made.append(self)

    def attach(self) -> Attachment:
        return self.client.attach(self.model, self.optimizer)

    def train(self, steps: int = STEPS) -> None:
        train(self.device, self.model, self.optimizer, steps)

    def end(self) -> None:
        """Everything that was issued happens, and what was copied is handed over."""
        self.device.idle()
        assert self.client.flush(timeout_s=30)


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    for training in Training.made:
        training.device.idle()
        training.client.close(10.0)
    Training.made.clear()


def test_every_snapshot_is_of_one_step_while_training_goes_on() -> None:
    training = Training(noted=False, slots=STEPS)
    training.attach()

    training.train()
    training.end()

    assert training.worker.steps == list(range(1, STEPS + 1))
    assert training.worker.torn == []
    assert training.client.stats()["torn"] == 0


def test_the_loop_is_not_held_up_by_a_copy() -> None:
    training = Training()
    training.attach()

    training.optimizer.step()

    assert training.device.now == 0.0
    assert training.worker.steps == []
    training.end()
    assert training.worker.steps == [1]


def test_without_the_wait_before_the_next_step_snapshots_tear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = Training(noted=False, slots=STEPS)
    training.attach()

    training.train()
    training.end()

    assert len(training.worker.torn) > STEPS / 2


def test_a_tear_that_the_versions_show_is_counted_and_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = Training(noted=True, slots=STEPS)
    training.attach()

    training.train()
    training.end()

    assert training.worker.torn == []
    assert training.client.stats()["torn"] > STEPS / 2


def test_a_buffer_that_forward_changes_during_the_copy_is_that_of_the_step() -> None:
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 99)
    training.end()

    assert training.worker.snapshots[0][1]["seen"].unique().tolist() == [1]
    assert training.worker.torn == []


def test_buffers_for_which_the_scratch_has_no_room_are_copied_before_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "plan_routes", lambda manifest: plan_routes(manifest, scratch_bytes=0))
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 99)
    training.end()

    assert training.device.allocated == [0]
    assert training.worker.torn == []


def test_an_optimizer_that_attach_was_not_given_waits_too() -> None:
    training = Training(noted=False)
    training.attach()
    other = Stamping(training.device, [training.model.weights[3]], noted=False, steps=6)
    training.optimizer.step()
    stamp(training.device, [training.model.seen], 1)

    other.step()
    training.end()

    assert training.worker.snapshots[0][1]["weights.3"].unique().tolist() == [1]
    assert training.model.weights[3].unique().tolist() == [7]


def test_an_optimizer_of_the_parameters_in_other_clothes_waits_too() -> None:
    training = Training(noted=False)
    training.attach()
    whole = nn.Parameter(training.model.weights[3].detach().view(2, -1))
    other = Stamping(training.device, [whole], noted=False, steps=6)
    training.optimizer.step()

    other.step()
    training.end()

    assert training.worker.snapshots[0][1]["weights.3"].unique().tolist() == [1]
    assert training.model.weights[3].unique().tolist() == [7]


def test_an_optimizer_of_another_model_waits_for_nothing() -> None:
    training = Training()
    training.attach()
    elsewhere = Carrying()
    training.optimizer.step()
    issued = len(training.device.compute.work)

    Stamping(training.device, elsewhere.parameters()).step()

    assert len(training.device.compute.work) == issued + len(elsewhere.weights)


def test_an_optimizer_of_tensors_without_memory_of_their_own_is_none_of_ours() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    issued = len(training.device.compute.work)

    SGD([nn.Parameter(torch.eye(3).to_sparse())], lr=0.1).step()

    assert len(training.device.compute.work) == issued


def test_a_device_that_cannot_be_asked_to_wait_costs_the_snapshot_and_not_the_training(
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


def test_a_write_outside_the_hooks_costs_the_snapshot_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    training.attach()
    for _ in range(2):
        training.optimizer.step()
        note_write(training.model.weights[1])
        training.end()

    assert training.worker.steps == []
    assert training.client.stats()["torn"] == 2
    assert len(training.worker.free) == 2
    assert ["before_weight_write" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("announced", [True, False])
def test_a_write_through_data_is_announced_or_tears(announced: bool) -> None:
    training = Training(noted=False)
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    if announced:
        training.client.before_weight_write()
    stamp(training.device, training.model.weights, 50)
    training.end()

    assert training.worker.torn == ([] if announced else [1])


def test_a_parameter_that_gets_other_memory_during_the_copy_is_copied_from_the_old_one() -> None:
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()
    training.device.advance(1e-4)  # the kernels; the copies take longer

    for weight in training.model.weights:
        weight.data = torch.full_like(weight, 99)
    training.end()

    assert training.worker.steps == [1]
    assert training.worker.torn == []


def test_after_attach_was_taken_back_a_copy_under_way_is_still_waited_for() -> None:
    training = Training(noted=False)
    handle = training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    handle.remove()
    training.optimizer.step()
    training.end()

    assert training.worker.steps == [1]
    assert training.worker.torn == []


def test_with_every_slot_in_use_a_step_is_skipped_and_nobody_waits() -> None:
    training = Training(slots=1)
    training.attach()
    training.optimizer.step()

    training.optimizer.step()

    assert training.client.stats()["skipped"]["busy"] == 1
    assert training.device.now == 0.0
    training.end()
    training.optimizer.step()
    training.end()
    assert training.worker.steps == [1, 3]


@pytest.mark.parametrize("way", ["overlap=False", "update"])
def test_a_copy_that_has_no_window_is_over_when_the_call_returns(way: str) -> None:
    training = Training(noted=False, overlap=way != "overlap=False")
    if way == "update":
        training.optimizer.step()
        training.client.update(training.model, 1)
    else:
        training.attach()
        training.optimizer.step()

    assert training.device.now > 0.0
    assert training.worker.steps == [1]
    stamp(training.device, training.model.parameters(), 99)
    training.end()
    assert set(training.worker.snapshots[0][1]["weights.0"].tolist()) == {1}


def test_an_update_during_a_copy_is_sent_after_it() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()

    training.client.update(training.model, 5)
    training.end()

    assert training.worker.steps == [1, 5]


def test_a_snapshot_right_after_another_leaves_the_scratch_alone_until_that_is_copied() -> None:
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 2, seconds=1e-9)
    training.client.update(training.model, 2)
    training.end()

    assert [snapshot["seen"].unique().tolist() for _, snapshot in training.worker.snapshots] == [[1], [2]]


def test_a_step_captured_into_a_graph_is_no_step_and_takes_no_snapshot(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    training.device.capturing = True
    issued, work = len(training.device.copied), len(training.device.compute.work)

    training.optimizer.step()
    training.optimizer.step()
    training.client.update(training.model)

    assert len(training.device.copied) == issued
    assert len(training.device.compute.work) == work + 2 * len(training.model.weights), (
        "a graph waits for nothing of ours"
    )
    assert training.client.steps == 1
    assert training.client.stats()["skipped"]["capturing"] == 3
    assert ["after each replay" in record.message for record in caplog.records] == [True]
    training.device.capturing = False
    training.end()
    training.optimizer.step()
    training.end()
    assert training.worker.steps == [1, 2]


@pytest.mark.parametrize("what", ["flush", "checkpoint", "finish", "rewind"])
def test_what_is_asked_of_the_server_waits_for_the_copies_before_it_and_no_longer_than_it_may(what: str) -> None:
    training = Training()
    training.worker.rewind_to = 0
    training.attach()
    training.optimizer.step()
    ask: dict[str, Any] = {
        "flush": lambda s: training.client.flush(s),
        "checkpoint": lambda s: training.client.checkpoint(1, s),
        "finish": lambda s: training.client.finish(s),
        "rewind": lambda s: training.client.rewind(0, s),
    }

    if what == "rewind":
        with pytest.raises(RewindError, match="has not copied"):
            ask[what](0.01)
    elif what != "finish":  # which closes
        assert not ask[what](0.01)
    assert training.worker.asked == []
    training.device.advance(10.0)
    assert ask[what](30.0) in (True, 0)
    assert training.worker.steps == [1]
    assert [word.split()[0] for word in training.worker.asked] == [what]


def test_closing_ends_the_thread_that_waits_for_copies() -> None:
    before = set(threading.enumerate())
    training = Training()
    training.attach()
    training.optimizer.step()
    (waiting,) = set(threading.enumerate()) - before
    training.device.advance(10.0)

    training.client.close()

    assert training.worker.steps == [1]
    assert not waiting.is_alive()


def test_a_client_that_was_forgotten_is_closed() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    training.end()
    worker = training.worker

    Training.made.clear()
    del training
    gc.collect()

    eventually(lambda: worker.closed == 1, "the worker is closed")


def _stagers() -> list[OverlappedStager]:
    return [thing for thing in gc.get_objects() if type(thing) is OverlappedStager]


def test_a_client_that_has_finished_holds_neither_the_model_nor_what_copies_took() -> None:
    before = set(map(id, _stagers()))
    training = Training()
    training.attach()
    training.optimizer.step()
    training.device.idle()
    model = weakref.ref(training.model)
    (stager,) = [weakref.ref(stager) for stager in _stagers() if id(stager) not in before]

    gc.disable()
    try:
        assert training.client.finish()
        del training.model, training.optimizer
        training.device.copied.clear()
        assert (model(), stager()) == (None, None)
    finally:
        gc.enable()
    assert training.client.steps == 1


def test_the_scratch_is_made_once() -> None:
    training = Training()
    training.attach()
    training.train(3)
    allocated = list(training.device.allocated)

    training.train(5)

    assert training.device.allocated == allocated


def test_slots_are_pinned_when_the_run_is_joined_and_unpinned_when_nobody_reads_them() -> None:
    training = Training()
    training.attach()
    pinned = list(training.device.pinned)

    training.train(5)

    assert training.device.pinned == pinned == [slot.tensor.data_ptr() for slot in training.worker.slots]
    still: list[list[int]] = []
    training.worker.when_closed = lambda timeout_s: still.append(list(training.device.pinned))
    training.end()
    training.client.close()
    assert still == [pinned]
    assert training.device.pinned == []


def test_memory_that_a_copy_may_still_write_to_stays_pinned() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()

    training.client.close(0.01)

    assert len(training.device.pinned) == 2
    training.device.idle()


def test_slots_that_cannot_be_pinned_cost_one_warning(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_copy_that_cannot_be_issued_costs_a_snapshot_and_leaves_nothing_behind_in_its_slot() -> None:
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
def test_a_copy_that_cannot_be_waited_for_costs_a_snapshot_and_its_memory_is_kept_if_it_may_still_arrive(
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

    def told() -> bool:
        training.device.idle()
        return training.client.flush(timeout_s=0)

    eventually(told, "the copy was given up")
    assert training.client.stats()["skipped"]["error"] == 1
    assert len(training.worker.free) == 2
    assert "the device is broken" in caplog.text
    issued = len(training.device.compute.work)
    training.client.before_weight_write()
    assert len(training.device.compute.work) == issued, "nothing is under way"
    training.client.close()
    assert len(training.device.pinned) == (0 if answers else 2)


def test_a_run_is_not_joined_while_a_graph_is_captured() -> None:
    training = Training()
    training.device.capturing = True

    with pytest.raises(SettingsError, match="captured"):
        training.client.update(training.model)

    assert training.worker.joins == []
    assert training.device.pinned == []
    training.device.capturing = False
    training.client.update(training.model)
    assert training.worker.steps == [1]


def _strided() -> tuple[nn.Module, Tensor]:
    """A module whose one large parameter is not row-major, and the weights that it has."""
    module, weights = nn.Module(), torch.arange(120_000.0).view(300, 400)
    module.weight = nn.Parameter(weights.t())
    return module, weights.t()


@pytest.mark.parametrize(("what", "room"), [("scratch", -1), ("bounce", 1 << 20)])
def test_a_device_without_room_costs_one_warning_and_the_overlap(
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
    assert len([nbytes for nbytes in device.allocated if nbytes > room]) == 1, "it is not asked again"
    assert client.stats()["skipped"]["error"] == 0
    assert ["CUDA out of memory" in record.message for record in caplog.records] == [True]
    client.close()


def test_a_device_that_fails_while_attach_makes_ready_does_not_make_it_raise(
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


def test_an_event_that_another_thread_has_not_recorded_yet_is_waited_for() -> None:
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


def test_an_event_that_is_never_recorded_holds_nobody_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_RECORDING_S", 0.01)
    device, worker, client, model, thread = _gated_training()

    client.before_weight_write()
    stamp(device, model.weights, 99)
    device.gate.set()
    thread.join(30)
    device.idle()

    assert client.flush(timeout_s=30)
    assert worker.steps == []
    assert client.stats()["torn"] == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_issues_nothing() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    issued = len(training.device.compute.work)
    nothing = nn.Parameter(torch.zeros(0))  # torch's own threads did not survive the fork: the child computes nothing

    child = os.fork()
    if child == 0:
        training.optimizer.param_groups[0]["params"][:] = [nothing]
        training.optimizer.step()
        training.client.before_weight_write()
        # The one kernel is the optimizer's.
        os._exit(0 if len(training.device.compute.work) == issued + 1 else 3)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    training.end()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_optimizer_step_is_held_back_and_not_compiled_anew_each_time() -> None:
    device, worker = FakeDevice(), RecordingWorker()
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    client = client_on(device, worker)
    client.attach(model, optimizer)
    step: Any = torch.compile(optimizer.step, backend="eager")
    graphs = []
    for _ in range(12):
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        step()
        device.idle()
        assert client.flush(timeout_s=30)
        graphs.append(counters["stats"]["unique_graphs"])

    assert worker.steps == list(range(1, 13))
    assert torch.equal(worker.snapshots[-1][1]["weight"], model.weight)
    assert graphs[-1] == graphs[2]


def test_the_fake_waits_for_nothing_where_an_event_was_not_recorded() -> None:
    device = FakeDevice()
    side = device.new_stream()
    seen: list[str] = []
    event = FakeEvent()
    event.wait(device.compute)
    device.run(1.0, lambda: seen.append("compute"))
    with device.issue_to(side):
        device.run(2.0, lambda: seen.append("side"))
    event.record(side)
    event.wait(device.compute)
    device.run(0.0, lambda: seen.append("after"))

    device.advance(1.5)
    assert seen == ["compute"]
    device.idle()
    assert seen == ["compute", "side", "after"]


def test_an_interpreter_that_ends_during_a_copy_ends_cleanly() -> None:
    program = Path(__file__).parents[1] / "support" / "leaving_during_a_copy.py"

    environ = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    left = subprocess.run(
        [sys.executable, program], env=environ, capture_output=True, text=True, timeout=100, check=False
    )

    assert (left.returncode, left.stdout) == (0, "copied\nsent 1\n"), left.stderr
