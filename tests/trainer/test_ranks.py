"""Clients of several processes of one training: rank 0 streams, the others do nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from support.fake_worker import OfflineClient
from trainer_client import EmaClient, SettingsError
from trainer_client.ranks import rank_of

_NO_SERVER = "tcp://127.0.0.1:1"


def _use(client: EmaClient) -> dict[str, Any]:
    """Everything that a script may call, three steps of training included."""
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    client.load_state_dict({"run": "r", "step": 4})
    handle = client.attach(model, optimizer)
    for _ in range(2):
        optimizer.step()
    handle.remove()
    client.update(model)
    client.before_weight_write()
    answers = {
        "set": client.set(model),
        "flush": client.flush(),
        "checkpoint": client.checkpoint(client.steps),
        "state": client.state_dict(),
        "steps": client.steps,
        "rewind": client.rewind(5),
        "after": client.steps,
        "finish": client.finish(),
        "again": client.finish(),
    }
    client.close()
    return answers


@pytest.mark.parametrize("how", ["argument", "launcher"])
def test_other_ranks_return_success_and_need_no_server(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ema")
    if how == "launcher":
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "4")
    client = EmaClient(_NO_SERVER, run="r", rank=3 if how == "argument" else None)

    assert _use(client) == {
        "set": True,
        "flush": True,
        "checkpoint": True,
        "state": {"run": "r", "step": 7},
        "steps": 7,
        "rewind": None,
        "after": 5,
        "finish": True,
        "again": True,
    }
    assert client.stats()["client"] == "inert"
    assert [record.getMessage() for record in caplog.records] == [
        "ema: rank 3 does not stream, unless the model is sharded: rank 0 does"
    ]


def test_context_of_another_rank_ends_without_a_server() -> None:
    with EmaClient(_NO_SERVER, run="r", rank=1) as client:
        client.update(nn.Linear(1, 1), 3)

    assert client.steps == 3
    assert repr(client) == "EmaClient(run='r', endpoint='tcp://127.0.0.1:1', inert, step=3)"


def test_wrong_arguments_are_refused_on_every_rank() -> None:
    with pytest.raises(SettingsError, match="every=0"):
        EmaClient(_NO_SERVER, run="r", every=0, rank=1)
    with pytest.raises(SettingsError, match="rank=-1"):
        EmaClient(_NO_SERVER, run="r", rank=-1)


def test_rank_0_streams_and_an_argument_overrides_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    client = OfflineClient(_NO_SERVER, run="r", rank=0)
    client.update(nn.Linear(1, 1))

    assert client.worker.steps == [1]


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, 0),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 0),
        ({"RANK": "2"}, 0),
        ({"RANK": "2", "WORLD_SIZE": "1"}, 0),
        ({"RANK": "", "WORLD_SIZE": "4"}, 0),
    ],
)
def test_rank_is_the_launchers_with_several_processes(environ: dict[str, str], rank: int) -> None:
    assert rank_of(None, environ) == rank


@pytest.mark.parametrize("environ", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "two"}])
def test_invalid_launcher_variable_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="pass rank=0"):
        rank_of(None, environ)


def test_rank_is_that_of_an_initialised_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert rank_of(None, {"RANK": "3", "WORLD_SIZE": "4"}) == 0
    finally:
        dist.destroy_process_group()


def test_other_ranks_weights_train_unchanged() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.5)
    EmaClient(_NO_SERVER, run="r", rank=1).attach(model, optimizer)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()

    assert torch.equal(model.weight, before - 0.5)
