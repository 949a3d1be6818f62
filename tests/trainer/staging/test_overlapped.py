"""Copies during training, on a device with a simulated clock: content of snapshots, and waits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from support.device_training import Carrying, Stamping, Training, note_write, stamp
from support.fake_device import FakeDevice, FakeEvent
from trainer_client.staging.copy_plan import CopyPlan
from trainer_client.staging.stagers import Stagers

STEPS = 8


def test_every_snapshot_is_of_one_step_during_training() -> None:
    training = Training(noted=False, slots=STEPS)
    training.attach()

    training.train(STEPS)
    training.end()

    assert training.worker.steps == list(range(1, STEPS + 1))
    assert training.worker.torn == []
    assert training.client.stats()["torn"] == 0


def test_copy_does_not_block_the_loop() -> None:
    training = Training()
    training.attach()

    training.optimizer.step()

    assert training.device.now == 0.0
    assert training.worker.steps == []
    training.end()
    assert training.worker.steps == [1]


def test_snapshots_tear_without_the_wait_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = Training(noted=False, slots=STEPS)
    training.attach()

    training.train(STEPS)
    training.end()

    assert len(training.worker.torn) > STEPS / 2


def test_torn_snapshot_is_counted_and_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = Training(noted=True, slots=STEPS)
    training.attach()

    training.train(STEPS)
    training.end()

    assert training.worker.torn == []
    assert training.client.stats()["torn"] > STEPS / 2


def test_buffer_changed_by_forward_during_the_copy_keeps_the_steps_value() -> None:
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 99)
    training.end()

    assert training.worker.snapshots[0][1]["seen"].unique().tolist() == [1]
    assert training.worker.torn == []


def test_buffers_larger_than_the_scratch_are_copied_before_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    of = CopyPlan.of
    monkeypatch.setattr(CopyPlan, "of", lambda manifest: of(manifest, scratch_bytes=0))
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 99)
    training.end()

    assert training.device.allocated == [0]
    assert training.worker.torn == []


def test_unattached_optimizer_of_the_model_waits_too() -> None:
    training = Training(noted=False)
    training.attach()
    other = Stamping(training.device, [training.model.weights[3]], noted=False, steps=6)
    training.optimizer.step()
    stamp(training.device, [training.model.seen], 1)

    other.step()
    training.end()

    assert training.worker.snapshots[0][1]["weights.3"].unique().tolist() == [1]
    assert training.model.weights[3].unique().tolist() == [7]


def test_optimizer_of_views_of_the_parameters_waits_too() -> None:
    training = Training(noted=False)
    training.attach()
    whole = nn.Parameter(training.model.weights[3].detach().view(2, -1))
    other = Stamping(training.device, [whole], noted=False, steps=6)
    training.optimizer.step()

    other.step()
    training.end()

    assert training.worker.snapshots[0][1]["weights.3"].unique().tolist() == [1]
    assert training.model.weights[3].unique().tolist() == [7]


def test_optimizer_of_another_model_waits_for_nothing() -> None:
    training = Training()
    training.attach()
    elsewhere = Carrying()
    training.optimizer.step()
    issued = len(training.device.compute.work)

    Stamping(training.device, elsewhere.parameters()).step()

    assert len(training.device.compute.work) == issued + len(elsewhere.weights)


def test_optimizer_of_sparse_tensors_waits_for_nothing() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    issued = len(training.device.compute.work)

    SGD([nn.Parameter(torch.eye(3).to_sparse())], lr=0.1).step()

    assert len(training.device.compute.work) == issued


def test_write_outside_the_hooks_drops_the_snapshot_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
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
def test_write_through_data_tears_unless_announced(announced: bool) -> None:
    training = Training(noted=False)
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    if announced:
        training.client.before_weight_write()
    stamp(training.device, training.model.weights, 50)
    training.end()

    assert training.worker.torn == ([] if announced else [1])


def test_parameter_moved_during_the_copy_is_copied_from_its_old_memory() -> None:
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


def test_removed_attachment_still_waits_for_a_copy_in_progress() -> None:
    training = Training(noted=False)
    handle = training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    handle.remove()
    training.optimizer.step()
    training.end()

    assert training.worker.steps == [1]
    assert training.worker.torn == []


def test_step_without_a_free_slot_is_skipped_without_waiting() -> None:
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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_snapshots_of_two_optimizers_have_the_step_of_both(order: tuple[int, int]) -> None:
    training = Training(noted=False, slots=STEPS)
    device, weights = training.device, training.model.weights
    optimizers = [Stamping(device, list(weights)[:2], noted=False), Stamping(device, list(weights)[2:], noted=False)]
    training.client.attach(training.model, optimizers)
    for step in range(1, STEPS + 1):
        stamp(device, [training.model.seen], step)
        device.run(0.02)
        for index in order:
            optimizers[index].step()
        device.advance(0.02)
    training.end()

    assert training.worker.steps == list(range(1, STEPS + 1))
    late = [1] if order == (0, 1) else []  # the first round's order is not known: the buffer is the next one's
    assert training.worker.torn == late
    first = training.worker.snapshots[0][1]
    assert all(first[f"weights.{index}"].unique().tolist() == [1] for index in range(4))


@pytest.mark.parametrize("way", ["overlap=False", "update"])
def test_copy_without_overlap_is_complete_on_return(way: str) -> None:
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


def test_update_during_a_copy_is_sent_after_it() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()

    training.client.update(training.model, 5)
    training.end()

    assert training.worker.steps == [1, 5]


def test_second_snapshot_waits_for_the_scratch_of_the_first() -> None:
    training = Training()
    training.attach()
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()

    stamp(training.device, [training.model.seen], 2, seconds=1e-9)
    training.client.update(training.model, 2)
    training.end()

    assert [snapshot["seen"].unique().tolist() for _, snapshot in training.worker.snapshots] == [[1], [2]]


def test_fake_device_does_not_wait_for_an_unrecorded_event() -> None:
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
