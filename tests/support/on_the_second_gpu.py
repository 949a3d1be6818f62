"""Trains on the second GPU of a machine, in a process whose current device stays the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from support.fake_worker import FakeWorker
from trainer_client import EmaClient
from trainer_client.settings import Settings

WORKER = FakeWorker(slots=3)


class Client(EmaClient):
    """A client of a worker without a server."""

    @staticmethod
    def _connect(settings: Settings) -> FakeWorker:
        return WORKER


def main() -> None:
    """Take three steps, and print whether the first GPU has a context."""
    weight = nn.Parameter(torch.zeros(1_000_000, device="cuda:1"))
    weight.grad = torch.ones_like(weight)
    optimizer = SGD([weight], lr=0.1)
    with Client("tcp://127.0.0.1:5555", run="r") as client:
        client.attach(nn.ParameterList([weight]), optimizer)
        for _ in range(3):
            optimizer.step()
    inside: Any = torch._C
    print(f"steps {WORKER.steps}, a context on GPU 0: {inside._cuda_hasPrimaryContext(0)}")


if __name__ == "__main__":
    main()
