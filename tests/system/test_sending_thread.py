"""Which thread sends a snapshot: small ones leave in the thread that offers them, large ones in the connection's."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from torch import nn

from support.processes import ServerProcess
from support.waiting import eventually
from trainer_client import EmaClient
from trainer_client.connection.driver import Driver
from trainer_client.connection.link import Link

_DRIVER = "ema-driver"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


@pytest.fixture
def client(server: ServerProcess, lane: str, request: pytest.FixtureRequest) -> Iterator[EmaClient]:
    run = re.sub(r"[^a-z0-9]+", "-", request.node.name)[:90].strip("-")
    client = EmaClient(server.zmq, run, averages=["raw"], when_behind="wait")
    yield client
    client.close()


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Messages written by each thread."""
    written: Counter[str] = Counter()

    def counted(send: Callable[..., bool]) -> Callable[..., bool]:
        def sent(*args: Any) -> bool:
            written[threading.current_thread().name] += 1
            return send(*args)

        return sent

    monkeypatch.setattr(Link, "send", counted(Link.send))
    monkeypatch.setattr(Link, "send_payload", counted(Link.send_payload))
    return written


def _update(client: EmaClient, model: nn.Module, times: int, writers: Counter[str]) -> None:
    """Join, and then count the messages of this many updates, each of which is applied before the next."""
    client.update(model)
    assert client.flush()
    writers.clear()

    for _ in range(times):
        client.update(model)
        eventually(lambda: client.stats()["last_committed_step"] == client.steps, "it is applied", every_s=0.05)


def test_small_snapshots_leave_in_the_thread_that_offers_them(
    client: EmaClient, lane: str, writers: Counter[str]
) -> None:
    _update(client, nn.Linear(100, 100), 10, writers)

    # The other one may be busy with an answer, or with a heartbeat.
    assert writers[threading.current_thread().name] >= 2 * 8  # BEGIN and COMMIT


def test_large_snapshots_leave_in_the_thread_of_the_connection_unless_the_memory_is_shared(
    client: EmaClient, lane: str, writers: Counter[str]
) -> None:
    _update(client, nn.Linear(1000, 1000), 5, writers)

    assert (threading.current_thread().name in writers) == (lane == "shm")


def test_offers_do_not_wait_while_the_thread_of_the_connection_acts(
    client: EmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(10, 10)
    client.update(model)
    assert client.flush()
    acting, go_on = threading.Event(), threading.Event()

    def hold(_: float) -> None:
        if threading.current_thread().name == _DRIVER:
            acting.set()
            go_on.wait(30)

    driver = _driver_of(client)
    monkeypatch.setattr(driver, "when_turning", hold)
    driver.attend()
    assert acting.wait(30)

    client.update(model)  # would wait for the 30 s

    assert not go_on.is_set()
    assert client.stats()["last_committed_step"] == 1
    go_on.set()
    assert client.flush()
    assert client.stats()["last_committed_step"] == 2


def test_answers_are_taken_when_the_training_thread_does_nothing_more(client: EmaClient) -> None:
    client.update(nn.Linear(10, 10))

    eventually(lambda: client.stats()["committed"] == 1, "the thread of the connection takes the answer")


def test_interrupt_while_a_message_is_written_reaches_the_script_and_costs_a_reconnection(
    client: EmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(10, 10)
    client.update(model)
    assert client.flush()
    send = Link.send

    def interrupted(link: Link, header: bytes, body: bytes | memoryview) -> bool:
        if threading.current_thread().name == _DRIVER or link._socket is None:
            return send(link, header, body)
        monkeypatch.setattr(Link, "send", send)
        link._socket.send(header, zmq.SNDMORE | zmq.NOBLOCK)
        raise KeyboardInterrupt

    monkeypatch.setattr(Link, "send", interrupted)

    with pytest.raises(KeyboardInterrupt):
        _update(
            client, model, 1000, Counter()
        )  # the other thread sends one if it is busy, with a heartbeat for example

    eventually(lambda: client.stats()["reconnects"] == 1, "it is connected again")
    client.update(model)
    assert client.flush()
    assert client.steps >= 3
    assert (client.stats()["committed"], client.stats()["last_committed_step"]) == (client.steps, client.steps)


def test_fault_while_a_message_is_written_ends_the_session_and_not_the_training(
    client: EmaClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(10, 10)
    client.update(model)
    assert client.flush()

    def broken(self: Link, header: bytes, body: bytes | memoryview) -> bool:
        raise OSError("no such socket")

    monkeypatch.setattr(Link, "send", broken)

    client.update(model)

    eventually(lambda: client.stats()["state"] == "failed", "the session has failed")
    client.update(model)
    assert client.stats()["skipped"]["stopped"] == 1
    assert any(record.levelno == logging.ERROR and "thread failed" in record.message for record in caplog.records)


def test_loop_of_pure_python_commits_a_larger_share_when_its_own_thread_sends(server: ServerProcess) -> None:
    share = {}
    for here in (True, False):
        with EmaClient(server.zmq, f"loop-{here}", averages=["raw"], lane="zmq") as client:
            model = nn.Linear(240, 240)
            client.update(model)
            assert client.flush()
            _driver_of(client)._is_small = here
            ends = time.monotonic() + 2
            while time.monotonic() < ends:
                begins = time.thread_time()
                while time.thread_time() - begins < 0.3e-3:
                    pass
                client.update(model)
            share[here] = client.stats()["committed"] / client.steps

    assert share[True] > share[False]


def _driver_of(client: EmaClient) -> Driver:
    session = client._session
    assert session is not None
    return session.worker._driver
