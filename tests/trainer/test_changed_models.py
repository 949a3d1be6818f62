"""A model that changes after its run was joined: training continues, and `on_change` decides about the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import SGD

from support.fake_worker import FakeWorker, OfflineClient
from trainer_client import ConnectError, JoinError, PlanError, SettingsError


class Net(nn.Module):
    """An embedding, a layer with weight norm, an observer and a buffer, of which each can change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.layer = parametrizations.weight_norm(nn.Linear(2, 2))
        self.plain = nn.Linear(2, 2)
        self.observer = PerChannelMinMaxObserver()
        self.register_buffer("history", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.observer(self.plain(self.layer(self.embed(x))))
        return out


class Adapted(nn.Module):
    """A layer with a correction of low rank beside it, as LoRA makes of a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(1, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 1))


def _add_adapter(net: Net) -> None:
    net.plain = Adapted(net.plain)  # type: ignore[assignment]


def _resize_vocabulary(net: Net) -> None:
    net.embed = nn.Embedding(7, 2)


def _run_forward(net: Net) -> None:
    net(torch.arange(3))


def _grow_buffer(net: Net) -> None:
    net.history = torch.zeros(2)


def _cast_buffer(net: Net) -> None:
    net.history = net.history.double()


def _add_buffer(net: Net) -> None:
    net.register_buffer("late", torch.zeros(1))


def _halve(net: Net) -> None:
    net.half()


def _remove_weight_norm(net: Net) -> None:
    parametrize.remove_parametrizations(net.layer, "weight")


def _prune(net: Net) -> None:
    prune.l1_unstructured(net.plain, "weight", amount=0.5)


_CHANGES: list[Callable[[Net], None]] = [
    _add_adapter,
    _resize_vocabulary,
    _run_forward,
    _grow_buffer,
    _cast_buffer,
    _add_buffer,
    _halve,
    _remove_weight_norm,
    _prune,
]


def _client(**given: Any) -> OfflineClient:
    return OfflineClient("tcp://127.0.0.1:5555", run="r", **given)


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("way", ["attach", "update"])
def test_change_stops_the_stream_and_not_the_training(
    change: Callable[[Net], None], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _client()
    if way == "attach":
        client.attach(net, optimizer)

    def step() -> None:
        optimizer.step()
        if way == "update":
            client.update(net)

    step()
    change(net)
    for _ in range(3):
        step()

    assert client.worker.steps == [1]
    assert client.steps == 4
    assert client.stats()["skipped"]["changed"] == 3
    assert "the model has changed" in client.stats()["stopped"]
    assert ["on_change='restart'" in text for text in _errors(caplog)] == [True]
    assert not client.set(net)
    assert client.finish()
    assert "ends with step 1: those up to 4 were not sent; since the model has changed" in caplog.text


@pytest.mark.parametrize("change", _CHANGES)
def test_change_raises_on_request(change: Callable[[Net], None]) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _client(on_change="raise")
    client.attach(net, optimizer)
    optimizer.step()
    change(net)

    for _ in range(2):
        with pytest.raises(PlanError, match="has changed"):
            optimizer.step()


class RestartingClient(OfflineClient):
    """Each connection has a worker of its own; `refuse` makes those after the first one fail."""

    workers: ClassVar[list[FakeWorker]]
    refuse: Exception | None = None

    @classmethod
    def _connect(cls, settings: Any) -> FakeWorker:
        worker = OfflineClient._connect(settings)
        if cls.workers and isinstance(cls.refuse, ConnectError):
            raise cls.refuse
        worker.refuse = cls.refuse if cls.workers and isinstance(cls.refuse, JoinError) else None
        cls.workers.append(worker)
        return worker


def _restarting(refuse: Exception | None = None) -> RestartingClient:
    class Client(RestartingClient):
        workers: ClassVar[list[FakeWorker]] = []

    Client.refuse = refuse
    return Client("tcp://127.0.0.1:5555", run="r", on_change="restart", step=10)


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("way", ["attach", "update"])
def test_change_begins_a_new_run_on_request(
    change: Callable[[Net], None], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _restarting()
    if way == "attach":
        client.attach(net, optimizer)
    for number in range(3):
        if number == 1:
            change(net)
        optimizer.step()
        if way == "update":
            client.update(net)

    old, new = client.workers
    assert old.steps == [11]
    assert (old.asked[-1], old.closed) == ("finish", 1)
    assert (new.joins[0].run, new.joins[0].resume, new.joins[0].first_step) == ("r", "never", 12)
    assert new.steps == [12, 13]
    sent, state = new.sent(-1), net.state_dict()
    assert sent.keys() == state.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in state.items())
    assert client.finish()
    assert _errors(caplog) == []


@pytest.mark.parametrize("refuse", [ConnectError("away"), JoinError("full")])
def test_failed_restart_does_not_raise_into_the_training(refuse: Exception, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _restarting(refuse)
    client.attach(net, optimizer)
    optimizer.step()
    _add_adapter(net)
    for _ in range(3):
        optimizer.step()
    client.update(net)

    assert client.workers[0].steps == [11]
    assert str(refuse) in _errors(caplog)[0]
    assert client.finish() == isinstance(refuse, ConnectError), "the first run goes on, or is over"


def test_restart_with_an_unsupported_model_keeps_the_run(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _restarting()
    client.attach(net, optimizer)
    optimizer.step()
    net.register_buffer("packed", torch.zeros(2, dtype=torch.complex64))
    for _ in range(2):
        optimizer.step()

    assert len(client.workers) == 1
    assert "complex" in _errors(caplog)[0]
    assert client.stats()["skipped"]["changed"] == 2
    assert client.finish()


def test_restored_model_is_streamed_again_after_attach() -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _client()
    handle = client.attach(net, optimizer)
    net.half()
    optimizer.step()
    net.float()
    optimizer.step()
    assert client.worker.steps == []

    handle.remove()
    client.attach(net, optimizer)
    optimizer.step()

    assert client.worker.steps == [3]
    assert client.stats()["stopped"] is None


def test_attaching_a_changed_model_raises() -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    client = _client()
    client.attach(net, optimizer).remove()
    _add_adapter(net)

    with pytest.raises(PlanError, match=r"'plain\.lora_A'"):
        client.attach(net, optimizer)


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(SettingsError, match="on_change='ignore' is unknown: use one of stop, raise, restart"):
        _client(on_change="ignore")
