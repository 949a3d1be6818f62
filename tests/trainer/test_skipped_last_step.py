"""A last step that found no slot is sent at the end, unless its weights may have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from support.fake_worker import FakeWorker, client_of
from trainer_client.model.shards import is_sharded


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[nn.Module]:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = nn.Linear(4, 4)
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert is_sharded(model.weight)
    yield model
    dist.destroy_process_group()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _sent_at_the_end(model: nn.Module, steps_after: int, *, attached: bool, **kind: bool) -> list[int]:
    """The steps that are sent if step 4 finds no slot, and slots are free again after `steps_after` further steps.

    Those are steps that are not due, or not given.
    """
    worker, optimizer = FakeWorker(slots=2), torch.optim.AdamW(model.parameters(), lr=0.1, **cast("Any", kind))
    with client_of(worker, every=2) as client:
        if attached:
            client.attach(model, optimizer)
        for step in range(1, 5 + steps_after):
            if step == 4:
                slots, worker.free = worker.free, []
            _step(model, optimizer)
            if not attached and step % 2 == 0 and step <= 4:
                client.update(model, step)
        worker.free = slots
        client.finish()
        return worker.steps


KINDS = pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])


@KINDS
@pytest.mark.parametrize("attached", [True, False])
def test_weights_that_have_changed_are_not_sent(attached: bool, kind: dict[str, bool]) -> None:
    assert _sent_at_the_end(nn.Linear(4, 4), 1, attached=attached, **kind) == [2]


@KINDS
@pytest.mark.parametrize("attached", [True, False])
def test_sharded_weights_that_have_changed_are_not_sent(
    sharded: nn.Module, attached: bool, kind: dict[str, bool]
) -> None:
    assert _sent_at_the_end(sharded, 1, attached=attached, **kind) == [2]


@KINDS
def test_unchanged_weights_are_sent(kind: dict[str, bool]) -> None:
    assert _sent_at_the_end(nn.Linear(4, 4), 0, attached=True, **kind) == [2, 4]


def test_unchanged_weights_that_were_given_by_hand_are_sent_if_writes_would_show() -> None:
    assert _sent_at_the_end(nn.Linear(4, 4), 0, attached=False) == [2, 4]
    assert _sent_at_the_end(nn.Linear(4, 4), 0, attached=False, fused=True) == [2], "a change could not be seen"
