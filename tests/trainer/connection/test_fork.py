"""Forked children (data loader workers) have a copy of the client that does nothing; trainers do not notice them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

from support.fake_worker import OfflineClient

ENDPOINT = "tcp://127.0.0.1:5555"


def _in_fork(report: Callable[[], Any]) -> Any:
    """What `report` returns in a forked child (as JSON values)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(report()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_every_method_does_nothing_in_a_forked_child(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    client = OfflineClient(ENDPOINT, run="r")
    client.attach(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()

    def child() -> Any:
        caplog.set_level(logging.DEBUG, "ema")
        optimizer.step()
        client.update(model)
        client.before_weight_write()
        client.load_state_dict({"run": "x", "step": 9})
        answers = [client.flush(), client.checkpoint(1), client.rewind(1), client.finish()]
        client.close()
        client.attach(model, optimizer).remove()
        asked = [client.worker.asked, client.worker.steps, client.worker.closed, client.steps]
        return [answers, asked, [record.levelname for record in caplog.records], client.stats()["steps"]]

    answers, asked, logged, steps = _in_fork(child)

    assert answers == [False, False, None, False]
    assert asked == [["greet"], [], 0, 0]
    assert logged == ["DEBUG"]
    assert steps == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_client_made_in_a_forked_child_works() -> None:
    def child() -> Any:
        client = OfflineClient(ENDPOINT, run="r")
        client.update(nn.Linear(1, 1))
        return client.worker.steps

    assert _in_fork(child) == [1]


class _Noise(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((2,), float(index))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_data_loader_workers_forked_after_attach_change_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.01)
    client = OfflineClient(ENDPOINT, run="r")
    client.attach(model, optimizer)
    for batch in DataLoader(_Noise(), batch_size=3, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        loss: Tensor = model(batch).square().mean()
        loss.backward()
        optimizer.step()

    assert client.worker.steps == [1, 2, 3, 4]
