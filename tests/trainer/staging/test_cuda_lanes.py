"""Training on a CUDA device with a real server, through the socket and shared memory: the averages are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from ema_reader import Reader
from support.processes import ServerProcess
from trainer_client import EmaClient

pytestmark = [pytest.mark.gpu, pytest.mark.process, pytest.mark.timeout(300)]

DEVICE = "cuda"
STEPS = 200
DECAY = 0.9


def _model() -> nn.Module:
    """10 MB: large and small parameters, one that is not row-major, and buffers."""
    torch.manual_seed(0)
    first = nn.Linear(1000, 1000)
    first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    return nn.Sequential(first, nn.BatchNorm1d(1000), nn.ReLU(), nn.Linear(1000, 1500)).to(DEVICE)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in model.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_averages_of_a_training_on_a_gpu_are_exact(lane: str, tmp_path: Path) -> None:
    model = _model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(32, 1000, device=DEVICE)
    average: dict[str, Tensor] = {}
    with ServerProcess(tmp_path / "data") as server:
        averages = ("raw", f"ema:{DECAY},buffers=average")
        with EmaClient(server.zmq, "r", averages, when_behind="wait", lane=lane) as client:  # type: ignore[arg-type]
            client.attach(model, optimizer)
            for _ in range(STEPS):
                optimizer.zero_grad()
                functional.mse_loss(model(inputs), torch.ones(32, 1500, device=DEVICE)).backward()
                optimizer.step()
                for name, value in _floats(model).items():
                    average[name] = torch.lerp(average[name], value, 1 - DECAY) if name in average else value
            stats, session = client.stats(), client._session
            assert session is not None
            slots = session.worker.slots
            assert [slot.tensor.is_pinned() for slot in slots] == [True] * len(slots)
            assert {slot.descriptor is not None for slot in slots} == {lane == "shm"}
            assert client.finish(timeout_s=100)
        with Reader(server.http) as reader:
            found = {}
            for name in ("raw", f"ema-{DECAY}"):
                folder = reader.download(reader.version("r", name), tmp_path / name)
                found[name] = load_file(folder / "model.safetensors")

    assert (stats["lane"], stats["torn"], sum(stats["skipped"].values())) == (lane, 0, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(found["raw"][name], value.cpu()), name
    for name, value in average.items():
        bound = STEPS * 9 * float(value.abs().max()) * 2.0**-24
        torch.testing.assert_close(found[f"ema-{DECAY}"][name].double(), value.cpu(), rtol=0, atol=bound)
