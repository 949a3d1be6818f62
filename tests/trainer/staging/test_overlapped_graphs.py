"""Steps that are captured into a graph or compiled, where snapshots are copied while training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from support.device_training import RecordingWorker, Training, client_on
from support.fake_device import FakeDevice
from trainer_client import SettingsError


def test_step_captured_into_a_graph_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
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


def test_joining_while_a_graph_is_captured_is_refused() -> None:
    training = Training()
    training.device.capturing = True

    with pytest.raises(SettingsError, match="captured"):
        training.client.update(training.model)

    assert training.worker.joins == []
    assert training.device.pinned == []
    training.device.capturing = False
    training.client.update(training.model)
    assert training.worker.steps == [1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_optimizer_step_is_compiled_once_and_without_our_hooks() -> None:
    from torch._dynamo.utils import counters  # to import it takes seconds, which only this test needs

    torch._dynamo.reset()
    device, worker, weight = FakeDevice(), RecordingWorker(), nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = SGD([weight], lr=0.25)
    client = client_on(device, worker)
    client.attach(nn.ParameterDict({"weight": weight}), optimizer)
    step: Any = torch.compile(optimizer.step, backend="eager")
    before, graphs = counters["stats"]["unique_graphs"], []
    for _ in range(3):
        step()
        device.idle()
        assert client.flush(timeout_s=30)
        graphs.append(counters["stats"]["unique_graphs"] - before)

    assert [tensors["weight"].tolist() for _, tensors in worker.snapshots] == [[0.75] * 2, [0.5] * 2, [0.25] * 2]
    assert graphs == [1, 1, 1], "the optimizer's own, at its first step"
