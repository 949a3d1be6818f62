"""Copies of sharded parameters (DTensors) during training, on a device with a simulated clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support.device_training import Carrying, Stamping, Training, note_write, stamp
from trainer_client.model.shards import is_sharded, local_of
from trainer_client.staging.stagers import Stagers
from trainer_client.staging.transfer import AsyncCopy

dtensors = pytest.importorskip("torch.distributed.tensor", reason="torch 2.4 has DTensor under a private name")

STEPS = 6


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    if not hasattr(dtensors, "distribute_tensor"):
        pytest.skip("torch 2.4 has DTensor under a private name")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _sharded(mesh: DeviceMesh, *, noted: bool, slots: int = STEPS) -> Training:
    """A training whose parameters are sharded, attached."""
    training = Training(noted=noted, slots=slots)
    weights = training.model.weights
    for index, weight in enumerate(weights):
        weights[index] = nn.Parameter(dtensors.distribute_tensor(weight.detach(), mesh, [dtensors.Shard(0)]))
    assert all(map(is_sharded, weights))
    training.optimizer = Stamping(training.device, list(weights), noted=noted)
    training.attach()
    return training


def test_every_snapshot_of_shards_is_of_one_step(mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=True)
    training.train(STEPS)
    training.end()
    assert training.worker.steps == list(range(1, STEPS + 1))
    assert training.worker.torn == []
    assert training.client.stats()["torn"] == 0


def test_optimizer_that_writes_shards_waits_for_the_copy_only_if_it_is_held_back(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = _sharded(mesh, noted=False)
    training.train(STEPS)
    training.end()
    assert len(training.worker.torn) > STEPS / 2


def test_torn_snapshot_of_shards_is_counted_and_not_sent(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    training = _sharded(mesh, noted=True)
    training.train(STEPS)
    training.end()
    assert training.worker.torn == []
    assert training.client.stats()["torn"] > STEPS / 2


def test_unannounced_write_to_a_shard_drops_the_snapshot(mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=True)
    training.optimizer.step()
    note_write(training.model.weights[1])
    training.end()
    assert training.worker.steps == []
    assert training.client.stats()["torn"] == 1


def test_unannounced_write_is_sent_if_versions_of_the_local_memory_are_compared(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why versions are those of the DTensors: their local tensors do not count the writes."""

    def record(self: AsyncCopy, side: object, watched: list[tuple[Tensor, int]], *memory: object) -> None:
        local = [local_of(tensor) for tensor, _ in watched]
        original(self, side, [(tensor, tensor._version) for tensor in local], *memory)  # type: ignore[arg-type]

    original = AsyncCopy.record
    monkeypatch.setattr(AsyncCopy, "record", record)
    training = _sharded(mesh, noted=True)
    training.optimizer.step()
    note_write(training.model.weights[1])
    training.end()
    assert training.worker.steps == [1]


def test_optimizer_of_the_local_shards_waits_too(mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=False)
    local = nn.Parameter(local_of(training.model.weights[3]).detach())
    other = Stamping(training.device, [local], noted=False, steps=6)
    training.optimizer.step()
    other.step()
    training.end()
    assert training.worker.snapshots[0][1]["weights.3"].unique().tolist() == [1]
    assert local.unique().tolist() == [7]


def test_optimizer_of_other_shards_waits_for_nothing(mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=True)
    elsewhere = [
        nn.Parameter(dtensors.distribute_tensor(weight.detach(), mesh, [dtensors.Shard(0)]))
        for weight in Carrying().weights
    ]
    training.optimizer.step()
    issued = len(training.device.compute.work)
    Stamping(training.device, elsewhere).step()
    assert len(training.device.compute.work) == issued + len(elsewhere)


@pytest.mark.parametrize("announced", [True, False])
def test_write_to_the_local_memory_tears_unless_announced(announced: bool, mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=False)
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()
    if announced:
        training.client.before_weight_write()
    stamp(training.device, training.model.weights, 50)
    training.end()
    assert training.worker.torn == ([] if announced else [1])


def test_shard_that_is_replaced_during_the_copy_is_copied_from_its_old_memory(mesh: DeviceMesh) -> None:
    training = _sharded(mesh, noted=True)
    stamp(training.device, [training.model.seen], 1)
    training.optimizer.step()
    training.device.advance(1e-4)  # the kernels; the copies take longer
    for index, weight in enumerate(training.model.weights):
        full = torch.full(weight.shape, 99.0)
        training.model.weights[index].data = dtensors.distribute_tensor(full, mesh, [dtensors.Shard(0)])
    training.end()
    assert training.worker.steps == [1]
    assert training.worker.torn == []
