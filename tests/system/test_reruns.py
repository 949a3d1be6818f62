"""Scripts and notebook cells that run again under the same name, and trainers that are live elsewhere."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ema_proto.errors import RejectCode
from support.processes import Process, ServerProcess
from trainer_client import EmaClient, JoinError

_SCRIPT = """
import os, sys, time, torch
from torch import nn
from trainer_client import EmaClient
_, endpoint, run, how = sys.argv
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
client = EmaClient(endpoint, run, ["raw"], when_behind="wait")
client.attach(model, optimizer)
for _ in range(20):
    optimizer.zero_grad()
    model(torch.ones(1, 4)).square().mean().backward()
    optimizer.step()
assert client.flush()
print("trained", os.getpid(), flush=True)
if how == "raises":
    raise ZeroDivisionError
if how == "exits":
    sys.exit(3)
if how == "leaves":
    os._exit(3)
if how == "waits":
    time.sleep(120)
client.finish()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("reruns") / "data") as process:
        yield process


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return str(re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60].strip("-"))


def _runs(server: ServerProcess, run: str) -> dict[str, dict[str, Any]]:
    """The run and those of its name that were set aside."""
    return {each["run"]: each for each in server.get("/v1/runs")["runs"] if each["run"].startswith(run)}


def _train(client: EmaClient, steps: int) -> tuple[nn.Module, SGD]:
    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    client.attach(model, optimizer)
    _step(model, optimizer, steps)
    return model, optimizer


def _step(model: nn.Module, optimizer: SGD, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(1, 4)).square().mean()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("how", "code"), [("finishes", 0), ("raises", 1), ("exits", 3), ("leaves", 3), ("killed", -9)])
def test_script_runs_again_after_any_exit(server: ServerProcess, run: str, how: str, code: int) -> None:
    with Process("-c", _SCRIPT, server.zmq, run, "waits" if how == "killed" else how) as first:
        first.wait_line(lambda line: line.startswith("trained"))
        if how == "killed":
            first.send(signal.SIGKILL)
        assert first.wait() == code

    with Process("-c", _SCRIPT, server.zmq, run, "finishes") as second:
        assert second.wait() == 0

    runs = _runs(server, run)
    (older,) = runs.keys() - {run}
    assert {name: each["step"] for name, each in runs.items()} == {run: 20, older: 20}
    assert [older in line for line in second.errors] == [True], "one line says what became of the earlier run"


def test_new_client_takes_the_run_over_from_an_older_one_of_its_process(
    server: ServerProcess, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = EmaClient(server.zmq, run, ["raw"], when_behind="wait")
    model, optimizer = _train(older, 3)
    newer = EmaClient(server.zmq, run, ["raw"], when_behind="wait")
    _train(newer, 2)
    _step(model, optimizer, 1)
    older.update(model)

    assert not older.finish()
    assert newer.finish()
    runs = _runs(server, run)
    assert sorted(each["step"] for each in runs.values()) == [2, 3]
    assert runs[run]["step"] == 2
    assert older.stats()["client"] == "inert"
    messages = [text for text in caplog.messages if "the earlier run of this name" not in text]
    assert [text.split(run)[0] for text in messages] == [
        "ema: a newer client of this process takes over run ",
        "ema: finish() did nothing: this client no longer streams run ",
    ]


def test_new_client_that_resumes_continues_the_run_of_an_older_one(server: ServerProcess, run: str) -> None:
    older = EmaClient(server.zmq, run, ["raw"], when_behind="wait")
    _train(older, 3)
    newer = EmaClient(server.zmq, run, ["raw"], when_behind="wait")
    newer.load_state_dict(older.state_dict())
    _train(newer, 2)

    assert newer.finish()
    assert {name: each["step"] for name, each in _runs(server, run).items()} == {run: 5}


def test_clients_of_other_runs_and_servers_are_unaffected(server: ServerProcess, run: str, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "other") as elsewhere:
        clients = [EmaClient(server.zmq, f"{run}-a", ["raw"], when_behind="wait")]
        clients += [EmaClient(at.zmq, f"{run}-b", ["raw"], when_behind="wait") for at in (server, elsewhere)]
        for client in clients:
            _train(client, 2)

        assert [client.finish() for client in clients] == [True, True, True]


def test_another_model_and_other_averages_begin_a_new_run(server: ServerProcess, run: str) -> None:
    with EmaClient(server.zmq, run, ["raw"], when_behind="wait") as client:
        client.update(nn.Linear(2, 2))
    with EmaClient(server.zmq, run, ["ema:0.5"], when_behind="wait") as client:
        client.update(nn.Linear(3, 3))

    assert [each["step"] for each in _runs(server, run).values()] == [1, 1]


def test_live_trainer_elsewhere_is_named_with_host_process_and_age(server: ServerProcess, run: str) -> None:
    with Process("-c", _SCRIPT, server.zmq, run, "waits") as live:
        process = live.wait_line(lambda line: line.startswith("trained")).split()[1]
        client = EmaClient(server.zmq, run, ["raw"], connect_timeout_s=20.0)

        with pytest.raises(
            JoinError, match=rf"process {process} on host .*{socket.gethostname()}.*joined \d+ s"
        ) as caught:
            client.update(nn.Linear(4, 4))
    assert caught.value.code is RejectCode.RUN_IN_USE
    assert {name: each["step"] for name, each in _runs(server, run).items()} == {run: 20}
