"""`EmaClient.pull`: an average in a module of the trainer. Over HTTP; what is served is written by the tests."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from support.fake_worker import OfflineClient
from support.served import Served, weights
from support.waiting import eventually
from trainer_client import ClientClosed, EmaClient, PlanError, SettingsError
from trainer_client.pulling import fetch
from trainer_client.pulling.pull import Pull

_NOBODY = "tcp://127.0.0.1:1"


class Net(nn.Module):
    """Its tensors are those that `Served.publish` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4))
        self.bias = nn.Parameter(torch.zeros(3))


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    _idle()


def _idle() -> None:
    """Wait until no version is looked for."""
    eventually(lambda: all(thread.name != "ema-pull" for thread in threading.enumerate()), "the thread has ended")


def _other_rank(run: str = "r", **given: Any) -> EmaClient:
    """A client that counts steps and streams nothing."""
    return EmaClient(_NOBODY, run=run, averages=["ema:0.9,name=ema"], rank=1, **given)


def _holds(net: Net, step: int) -> bool:
    return all(
        torch.equal(tensor, weights("ema", step, 8)[name].to(tensor)) for name, tensor in net.state_dict().items()
    )


def _step(client: EmaClient, step: int) -> None:
    client.update(Net(), step)


def test_version_of_a_due_step_is_copied_in_place_after_the_next_one(served: Served, url: str) -> None:
    client, net = _other_rank(), Net()
    places = [tensor.data_ptr() for tensor in net.state_dict().values()]
    pull = client.pull(net, every=10, url=url)
    held = []
    for step in range(1, 41):
        if step % 10 == 0:
            served.publish("r", step, ["ema"])
        _step(client, step)
        _idle()
        held.append(pull.step)
        assert pull.step is None or _holds(net, pull.step)
    client.close()

    assert held == [None] * 19 + [10] * 10 + [20] * 10 + [30]
    assert [tensor.data_ptr() for tensor in net.state_dict().values()] == places
    assert client.stats()["pulls"] == [
        {"average": "ema", "step": 30, "version": pull.version, "copied": 3, "error": None}
    ]


def test_attached_client_of_another_rank_pulls_after_its_optimizers_steps(served: Served, url: str) -> None:
    served.publish("r", 2, ["ema"])
    client, net, model = _other_rank(), Net(), nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    client.attach(model, optimizer)
    pull = client.pull(net, every=2, url=url)
    for step in range(1, 5):
        optimizer.step()
        if step == 2:
            _idle()
    client.close()

    assert pull.step == 2
    assert _holds(net, 2)


def test_module_in_bf16_gets_rounded_weights(served: Served, url: str) -> None:
    served.publish("r", 5, ["ema"])
    client, net = _other_rank(), Net().to(torch.bfloat16)
    _step(client, 5)
    with client:
        assert client.pull(net, url=url).wait(30.0)

    assert net.weight.dtype is torch.bfloat16
    assert _holds(net, 5)


def test_version_of_the_due_step_is_waited_for_where_an_older_one_exists(
    served: Served, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_PATIENCE_S", 60.0)
    served.publish("r", 7, ["ema"])
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=10, url=url)
    _step(client, 10)
    served.publish("r", 10, ["ema"])
    served.publish("r", 13, ["ema"])
    with client:
        assert pull.wait(30.0)

    assert pull.step == 10


def test_older_version_is_taken_if_the_due_step_is_not_published(
    served: Served, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_PATIENCE_S", 0.3)
    served.publish("r", 7, ["ema"])
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=10, url=url)
    _step(client, 10)
    with client:
        assert pull.wait(30.0)

    assert (pull.step, pull.version) == (7, served.catalog.generations("r")[-1].versions[0].id)


def test_rank_0_asks_the_server_to_publish_each_due_step_once(served: Served, url: str) -> None:
    client = OfflineClient(_NOBODY, run="r", averages=["ema:0.9,name=ema"], every=3)
    model = Net()
    pull = client.pull(Net(), every=10, url=url)
    for step in range(1, 31):
        client.update(model, step)
        if step % 10 == 0:
            served.publish("r", step - step % 3, ["ema"])  # the newest that `every` sends
            _idle()
    asked = client.worker.asked.count("publish soon")
    client.close()

    assert asked == 3
    assert pull.step == 18


def test_rank_0_asks_again_at_each_due_step_while_nothing_is_published(url: str) -> None:
    client, model = OfflineClient(_NOBODY, run="r", averages=["ema:0.9,name=ema"]), Net()
    client.pull(Net(), every=10, url=url)
    for step in range(1, 31):
        client.update(model, step)
    asked = client.worker.asked.count("publish soon")
    client.close()

    assert asked == 3


def test_client_that_another_one_has_replaced_pulls_nothing(served: Served, url: str) -> None:
    served.publish("r", 1, ["ema"])
    first, second = (OfflineClient(_NOBODY, run="r", averages=["ema:0.9,name=ema"]) for _ in range(2))
    first.update(Net(), 1)
    second.update(Net(), 1)

    assert not first.pull(Net(), url=url).wait(30.0)
    assert second.pull(Net(), url=url).wait(30.0)
    second.close()


def test_wait_needs_no_due_step_and_is_false_without_a_newer_version(served: Served, url: str) -> None:
    served.publish("r", 4, ["ema"])
    client = _other_rank()
    _step(client, 4)
    with client:
        pull = client.pull(Net(), url=url)
        assert pull.wait(30.0)
        assert not pull.wait(0.3)
        assert not pull.refresh()
        pull.remove()

    assert pull.step == 4


@pytest.mark.parametrize(
    ("size", "problem"),
    [(8, None), (5, r"'weight' is [5, 4] in the average and [8, 4] in the module")],
)
def test_average_that_does_not_fit_ends_the_pull_with_one_error(
    size: int, problem: str | None, served: Served, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=10, url=url)
    for step in (10, 20, 30):
        served.publish("r", step, ["ema"], size=size)
        _step(client, step)
        _idle()
    client.close()

    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == (problem is not None)
    assert (problem is None) == _holds(net, 20)
    assert problem is None or (problem in errors[0] and problem in (pull.error or "") and bool((net.weight == 0).all()))


def test_module_that_changes_later_ends_the_pull_and_training_goes_on(
    served: Served, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    served.publish("r", 10, ["ema"])
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=10, url=url)
    _step(client, 10)
    _idle()
    net.bias = nn.Parameter(torch.zeros(4))
    _step(client, 20)
    client.close()

    assert "'bias' is [3] in the average and [4] in the module" in (pull.error or "")
    assert (pull.step, client.steps) == (None, 20)
    assert "is no longer pulled, training goes on" in caplog.text


def test_tensors_that_the_average_lacks_are_kept_and_named_once(
    served: Served, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, net = _other_rank(), Net()
    net.head = nn.Linear(2, 2)
    before = net.head.weight.detach().clone()
    client.pull(net, every=10, url=url)
    for step in (10, 20, 30):
        served.publish("r", step, ["ema"])
        _step(client, step)
        _idle()
    client.close()

    assert torch.equal(net.head.weight, before)
    assert torch.equal(net.bias, torch.full((3,), 20.0))
    assert [record.getMessage() for record in caplog.records] == [
        "ema: average ema has no 'head.weight', 'head.bias': the module keeps its own values of these"
    ]


def test_server_that_is_away_is_reported_once_and_asked_again(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served.publish("r", 10, ["ema"])
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=10, url=f"http://127.0.0.1:{port}")
    _step(client, 10)
    eventually(lambda: pull.error, "the failure is reported")
    _step(client, 20)
    with served.listening(port):
        assert pull.wait(30.0)
    client.close()

    assert (pull.step, pull.error) == (10, None)
    assert [record.getMessage() for record in caplog.records if "cannot be pulled now" in record.getMessage()]
    assert len(caplog.records) == 1


def test_training_goes_on_while_the_server_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client, net = _other_rank(), Net()
        pull = client.pull(net, every=1, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        for step in range(1, 1001):
            _step(client, step)
        waiting = any(thread.name == "ema-pull" for thread in threading.enumerate())
        stats = client.stats()
        client.close()

    assert waiting
    assert (client.steps, pull.step) == (1000, None)
    assert 0 < stats["blocked_s_max"] <= stats["blocked_s_total"]


def test_copies_count_as_blocked_time_and_waits_do_not(served: Served, url: str) -> None:
    client = _other_rank()
    _step(client, 10)
    pull = client.pull(Net(), url=url)
    assert not pull.wait(0.2)
    waited = client.stats()["blocked_s_total"]
    served.publish("r", 10, ["ema"])
    assert pull.wait(30.0)
    client.close()

    assert waited == 0
    assert client.stats()["blocked_s_total"] > 0


@pytest.mark.parametrize("end", ["finish", "close"])
def test_ended_client_pulls_nothing_more(end: str, served: Served, url: str) -> None:
    client, net = OfflineClient(_NOBODY, run="r", averages=["ema:0.9,name=ema"]), Net()
    client.update(Net(), 1)
    pull = client.pull(net, every=1, url=url)
    client.update(Net(), 2)
    served.publish("r", 2, ["ema"])
    _idle()
    getattr(client, end)()

    assert not pull.wait(30.0)
    assert not pull.refresh()
    assert (pull.step, bool((net.weight == 0).all())) == (None, True)
    with pytest.raises(ClientClosed):
        client.pull(net, url=url)


def test_forgotten_client_ends_its_thread(url: str) -> None:
    client = _other_rank()
    client.pull(Net(), every=1, url=url)
    _step(client, 1)
    del client
    gc.collect()

    _idle()


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_pulls_nothing(served: Served, url: str) -> None:
    client, net = _other_rank(), Net()
    pull = client.pull(net, every=1, url=url)
    _step(client, 1)

    def child(queue: Any) -> None:
        _step(client, 2)
        queue.put((pull.refresh(), pull.wait(30.0), pull.step))
        pull.remove()
        client.close()

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    answers = queue.get(timeout=60.0)
    process.join(60.0)
    served.publish("r", 1, ["ema"])
    with client:
        assert pull.wait(30.0)

    assert (answers, process.exitcode) == ((False, False, None), 0)


def _pull_of_the_trained_model(client: OfflineClient) -> Pull:
    model = Net()
    client.attach(model, SGD(model.parameters(), lr=0.1))
    return client.pull(model)


@pytest.mark.parametrize(
    ("pull", "error"),
    [
        (lambda client: client.pull("teacher"), "into=str is not a torch.nn.Module"),
        (lambda client: client.pull(Net(), every=0), "every=0 is not between 1"),
        (lambda client: client.pull(Net(), url="ftp://x"), "is not an http or https URL"),
        (_pull_of_the_trained_model, "has parameters that are trained"),
    ],
)
def test_wrong_arguments_are_refused(pull: Any, error: str) -> None:
    with OfflineClient(_NOBODY, run="r") as client, pytest.raises(SettingsError, match=error):
        pull(client)


def test_module_that_cannot_be_written_is_refused(url: str) -> None:
    with _other_rank() as client, pytest.raises(PlanError, match="meta device"):
        client.pull(nn.Linear(1, 1, device="meta"), url=url)


def test_other_ranks_must_know_the_run(url: str) -> None:
    client = EmaClient(_NOBODY, rank=1)

    with pytest.raises(SettingsError, match="pass run=, or set EMA_RUN"):
        client.pull(Net(), url=url)


def test_missing_reader_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ema_reader", None)

    with _other_rank() as client, pytest.raises(SettingsError, match=r"pip install '\.\[trainer,reader\]'"):
        client.pull(Net())


def test_unknown_average_is_said_at_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with _other_rank() as client:
        client.pull(Net(), "ema-0.99", url=url)

    assert "ema: pull: 'ema-0.99' is not among the averages of this client: ema" in caplog.text


def test_token_of_the_client_is_used(tmp_path: Any) -> None:
    guarded = Served(tmp_path, token="secret")
    guarded.publish("r", 3, ["ema"])
    client, net = _other_rank(token="secret"), Net()
    _step(client, 3)
    with guarded.listening() as url, client:
        copied = client.pull(net, url=url).wait(30.0)
    guarded.close()

    assert copied
    assert _holds(net, 3)
