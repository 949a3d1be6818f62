"""Snapshots copied while training goes on, sent to a real server: it gets what the device had at that step."""

from __future__ import annotations

from pathlib import Path

import torch

from ema_reader import Reader
from support.device_training import Carrying, Stamping, train
from support.fake_device import FakeDevice
from support.processes import ServerProcess
from trainer_client import EmaClient
from trainer_client.connection.worker import Worker
from trainer_client.settings import Settings

STEPS = 12


def test_overlapped_steps_arrive_complete_and_in_order(tmp_path: Path) -> None:
    device, model = FakeDevice(), Carrying()
    optimizer = Stamping(device, model.parameters(), noted=False)

    class Client(EmaClient):
        @staticmethod
        def _connect(settings: Settings) -> Worker:
            return Worker.connect(settings.endpoint, None, settings.connect_timeout_s, lambda place: device)

    with ServerProcess(tmp_path / "data") as server:
        client = Client(server.zmq, "overlapped", ["raw", "ema:0.5"], when_behind="wait")
        client.attach(model, optimizer)
        for _ in range(STEPS):
            train(device, model, optimizer, 1)
            device.idle()
            assert client.flush()

        assert client.stats()["committed"] == STEPS
        assert client.finish()
        assert device.pinned == []
        with Reader(server.http) as reader:
            raw = reader.load(reader.version("overlapped", "raw"))
            average = reader.load(reader.version("overlapped", "ema-0.5"))
    assert all(tensor.unique().tolist() == [STEPS] for tensor in raw.values())
    expected = 1.0
    for step in range(2, STEPS + 1):
        expected += 0.5 * (step - expected)
    for tensor in average.values():
        assert torch.allclose(tensor.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
