"""FSDP2 on a real CUDA device, with a mesh of one: snapshots of sharded parameters, copied while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from support.fake_worker import KeepingWorker, client_of
from support.late_copies import delay_copies
from trainer_client.model.shards import is_sharded
from trainer_client.staging.stagers import Stagers

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

WIDTH = 6000  # 288 MB of parameters: copying them takes longer than a step


@pytest.fixture
def model(tmp_path: Path) -> Iterator[nn.Module]:
    """A sharded model, large enough that a copy is still under way when the next call is made."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("cuda:nccl,cpu:gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)]
    module = nn.Sequential(*layers).cuda()
    fsdp.fully_shard(module, mesh=init_device_mesh("cuda", (1,)))
    yield module
    torch.cuda.synchronize()
    dist.destroy_process_group()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(16, WIDTH, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Any] = model.state_dict()
    return {name: value.full_tensor().detach().cpu().clone() for name, value in values.items()}


def test_sharded_training_is_streamed_bit_for_bit(model: nn.Module) -> None:
    worker, optimizer = KeepingWorker(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert all(is_sharded(parameter) for parameter in model.parameters())
    expected: dict[int, dict[str, Tensor]] = {}
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for step in range(1, 13):
            _step(model, optimizer)
            if step % 3 == 0:
                assert client.flush(timeout_s=60)
            expected[step] = _whole(model)
        assert client.flush(timeout_s=60)
    assert len(worker.snapshots) >= 4
    for step, snapshot in worker.snapshots.items():
        assert all(torch.equal(value, expected[step][name]) for name, value in snapshot.items()), step
    assert client.stats()["torn"] == 0


def test_unannounced_write_to_a_sharded_parameter_costs_its_snapshot(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    worker, optimizer = KeepingWorker(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for step in range(1, 6):
            _step(model, optimizer)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            client.flush(timeout_s=60)
            assert (client.stats()["torn"], worker.snapshots) == (step, {})


@pytest.mark.parametrize("waits", [True, False])
def test_sharded_snapshots_tear_only_without_the_wait_before_the_next_step(
    model: nn.Module, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    if not waits:
        monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    # `foreach` and `fused` optimizers write sharded parameters without raising their versions: the control would see
    # no write.
    worker, optimizer = KeepingWorker(), torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(20):
            optimizer.step()
        client.flush(timeout_s=60)
    assert bool(client.stats()["torn"]) is not waits
    assert worker.snapshots or not waits
