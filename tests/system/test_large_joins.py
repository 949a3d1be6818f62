"""Other trainers are served while the server reads the JOIN of a trainer with very many tensors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_proto.errors import RemoteProtocolError
from ema_proto.receiver.machine import UnreadJoin
from ema_proto.wire.messages import ControlMessage
from support.server_core import WAIT_S, running_core
from support.waiting import eventually
from trainer_client import EmaClient


def test_trainers_are_served_while_a_large_join_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, release = threading.Event(), threading.Event()
    read = UnreadJoin.read

    def slow(unread: UnreadJoin) -> ControlMessage | RemoteProtocolError:
        reached.set()
        assert release.wait(WAIT_S)
        return read(unread)

    monkeypatch.setattr(UnreadJoin, "read", slow)
    many = nn.ParameterList([torch.ones(2) for _ in range(2000)])
    few = nn.Linear(3, 2)
    with running_core(tmp_path, zmq="tcp://127.0.0.1:0") as core:
        endpoint = core.server.ingest.start()
        small = EmaClient(endpoint, run="small", averages=["ema:0.9"], when_behind="wait")
        large = EmaClient(endpoint, run="large", averages=["ema:0.9"])
        try:
            starting = threading.Thread(target=lambda: large.update(many))
            starting.start()
            assert reached.wait(WAIT_S)
            for _ in range(20):
                small.update(few)
            assert small.flush(WAIT_S)
            status = core.statuses.get("small")
            assert status is not None
            assert status.applied == 20
            assert core.statuses.get("large") is None

            release.set()
            starting.join(WAIT_S)
            eventually(lambda: core.statuses.get("large"), "the large run", WAIT_S)
        finally:
            release.set()
            small.close()
            large.close()
