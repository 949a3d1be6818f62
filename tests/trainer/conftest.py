"""For tests of the trainer: clients on a simulated device are closed, and torch uses one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from support.device_training import opened
from trainer_client.session import _streaming


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Several threads spin while they wait for each other, which is slow beside other processes.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    for device, client in opened:
        closing = threading.Thread(target=client.close, args=(10.0,))
        closing.start()
        while closing.is_alive():  # it may copy a last snapshot, for which the device's clock must advance
            device.idle()
            closing.join(0.005)
    opened.clear()
    for session in tuple(_streaming):  # a new client of the same run would end it, and log that
        session.close(0.0)
