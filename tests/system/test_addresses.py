"""Server, trainer and reader at the addresses that the server prints, for each kind of loopback host."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from ema_reader import Reader
from support.processes import ServerProcess
from trainer_client import EmaClient


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


_NEEDS_IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("[::1]", marks=_NEEDS_IPV6)])
def test_printed_addresses_are_reached_by_trainer_and_reader(tmp_path: Path, host: str) -> None:
    model = torch.nn.Linear(2, 2)
    with ServerProcess(tmp_path / "data", zmq=f"tcp://{host}:0", http=f"{host}:0") as server:
        with EmaClient(server.zmq, "r", ["raw"], when_behind="wait") as client:
            client.update(model, 1)
            assert client.finish()
        with Reader(server.http) as reader:
            assert torch.equal(reader.load(reader.version("r", "raw"))["weight"], model.weight)
