"""After an internal error of the server, the trainer joins its run again. The server is of this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_server.compute.pool import WorkerPool
from ema_server.config import ServerConfig
from ema_server.server import build
from support.waiting import eventually
from trainer_client import EmaClient

_WAIT_S = 20.0


@contextmanager
def _serving(data: Path) -> Iterator[str]:
    """An averager and its ingest thread; yields the endpoint."""
    server = build(ServerConfig(data, kernel="torch", zmq="tcp://127.0.0.1:0"))
    server.start()
    try:
        yield server.ingest.start()
    finally:
        server.ingest.stop(_WAIT_S)
        server.averager.stop(_WAIT_S)
        server.close()


@contextmanager
def _streaming(endpoint: str) -> Iterator[tuple[EmaClient, nn.Linear]]:
    client, model = EmaClient(endpoint, run="r", averages=["raw"], when_behind="wait"), nn.Linear(2, 2)
    try:
        yield client, model
    finally:
        client.close()


def _break(monkeypatch: pytest.MonkeyPatch, times: int) -> list[None]:
    """Have the averaging fail so many times; the list that is returned has an entry for each."""
    update, failed = WorkerPool.update, list[None]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if len(failed) < times:
            failed.append(None)
            raise RuntimeError("a defect")
        return update(*args, **kwargs)

    monkeypatch.setattr(WorkerPool, "update", failing)
    return failed


@pytest.mark.usefixtures("lane")
def test_run_goes_on_from_its_newest_generation_after_an_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _serving(tmp_path) as endpoint, _streaming(endpoint) as (client, model):
        for step in (1, 2, 3):
            client.update(model, step)
        assert client.checkpoint(3)
        client.update(model, 4)
        assert client.flush()
        failed = _break(monkeypatch, 1)
        with torch.no_grad():
            model.weight.fill_(5)
        client.update(model, 5)
        eventually(lambda: client.stats()["last_committed_step"] == 5, "the failed step is sent again and applied")
        client.update(model, 6)
        assert client.finish()
        stats = client.stats()

    assert len(failed) == 1
    assert (stats["reconnects"], stats["dropped"]) == (1, {})
    assert "1 steps that it had applied since its last generation are lost and count as a gap" in caplog.text
    assert "ema: the run is no longer streamed" not in caplog.text


def test_run_that_fails_each_time_is_given_up_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ema_proto.sender.machine.REJOINS_MAX", 2)
    with _serving(tmp_path) as endpoint, _streaming(endpoint) as (client, model):
        client.update(model, 1)
        assert client.checkpoint(1)
        failed = _break(monkeypatch, 1000)
        client.update(model, 2)
        eventually(lambda: client.stats()["state"] == "failed", "the client gives up")
        client.update(model, 3)
        stats = client.stats()

    assert len(failed) == 3
    assert (stats["reconnects"], stats["skipped"]["stopped"]) == (2, 1)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    given_up = [error for error in errors if "the run is no longer streamed" in error]
    assert len(given_up) == 1
    assert "a defect" in given_up[0]
    assert "joined again 2 times, and no snapshot was applied" in given_up[0]
