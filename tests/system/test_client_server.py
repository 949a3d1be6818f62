"""The client against a real server over real TCP: errors, streamed steps, and the effect of a missing server."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

from ema_proto.errors import RejectCode
from ema_reader import Reader
from support.processes import Process, ServerProcess
from support.toy import Toy
from support.waiting import eventually
from trainer_client import ConnectError, EmaClient, JoinError, RewindError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for the tests that leave it alone; each has a run of its own."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return str(re.sub(r"[^a-z0-9]+", "-", request.node.name)[:90].strip("-"))


def _client(server: ServerProcess, run: str, **given: Any) -> EmaClient:
    settings: dict[str, Any] = {"averages": ["raw", "ema:0.5"], "when_behind": "wait", **given}
    return EmaClient(server.zmq, run, **settings)


def _raw(server: ServerProcess, run: str) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest version of `raw`."""
    with Reader(server.http) as reader:
        version = reader.version(run, "raw")
        return version.step, reader.load(version)


def _closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.usefixtures("lane")
def test_weights_of_the_last_step_arrive_bit_for_bit(server: ServerProcess, run: str) -> None:
    model = Toy()
    with _client(server, run) as client:
        for step in range(1, 6):
            client.update(model.at(step), step)
        assert client.flush()
        assert client.stats()["last_committed_step"] == 5

    step, weights = _raw(server, run)
    assert step == 5
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_first_snapshots_are_measured_and_reported_once(
    server: ServerProcess, run: str, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ema")
    model = nn.Linear(64, 64)
    with _client(server, run) as client:
        for _ in range(60):
            client.update(model)
        assert client.flush()

    lines = [record for record in caplog.records if "a snapshot has" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.INFO]
    assert "a snapshot has 0.0166 MB" in lines[0].getMessage()
    assert f"sending it over {lane}" in lines[0].getMessage()


@pytest.mark.usefixtures("lane")
def test_tensors_in_another_order_than_those_of_the_run_are_put_in_their_places(
    server: ServerProcess, run: str
) -> None:
    layers = {"first": nn.Linear(5, 3), "second": nn.Linear(3, 7)}
    with _client(server, run, averages=["raw"]) as client:
        client.update(nn.ModuleDict(layers))
        assert client.checkpoint(1)
    for layer in layers.values():
        nn.init.uniform_(layer.weight)
    turned = nn.ModuleDict({name: layers[name] for name in ("second", "first")})
    with _client(server, run, averages=["raw"], step=1, resume="must") as client:
        client.update(turned)

    step, weights = _raw(server, run)
    assert step == 2
    assert weights.keys() == turned.state_dict().keys()
    for name, tensor in turned.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.usefixtures("lane")
def test_weights_written_after_update_do_not_reach_the_server(server: ServerProcess, run: str) -> None:
    model = nn.Linear(512, 512)
    with _client(server, run) as client:
        expected = model.weight.detach().clone()
        client.update(model)
        nn.init.zeros_(model.weight)

    assert torch.equal(_raw(server, run)[1]["weight"], expected)


def test_attach_with_forked_data_loader_workers_streams_every_step(server: ServerProcess, run: str) -> None:
    class Noise(Dataset[Tensor]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Tensor:
            return torch.full((4,), float(index) / 24)

    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Noise(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    with _client(server, run) as client:
        client.attach(model, optimizer)
        for batch in loader:
            optimizer.zero_grad()
            loss: Tensor = model(batch).square().mean()
            loss.backward()
            optimizer.step()

    stats = client.stats()
    assert (stats["committed"], stats["steps"], sum(stats["skipped"].values())) == (12, 12, 0)
    step, weights = _raw(server, run)
    assert step == 12
    assert torch.equal(weights["weight"], model.weight)


def test_unused_address_fails_at_construction_with_advice() -> None:
    started = time.monotonic()

    with pytest.raises(ConnectError, match=r"nothing listens.*ema serve"):
        EmaClient(f"tcp://127.0.0.1:{_closed_port()}", "r", connect_timeout_s=0.5)
    assert time.monotonic() - started < 20


def test_readers_address_fails_at_construction_without_waiting(server: ServerProcess) -> None:
    started = time.monotonic()

    with pytest.raises(ConnectError, match=r'is the address of an HTTP server.*prints as "zmq"'):
        EmaClient(f"tcp://{server.http_address}", "r", connect_timeout_s=60.0)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("token", [None, "wrong"])
def test_wrong_token_fails_at_construction(tmp_path: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMA_TOKEN", "right")
    with ServerProcess(tmp_path / "data") as server:
        EmaClient(server.zmq, "r").close()
        monkeypatch.delenv("EMA_TOKEN")

        with pytest.raises(ConnectError, match="token"):
            EmaClient(server.zmq, "r", token=token)


def test_resume_before_the_first_generation_is_refused_with_advice(server: ServerProcess, run: str) -> None:
    with _client(server, run) as client:
        client.update(nn.Linear(2, 2), 5)

    again = _client(server, run, step=0)
    with pytest.raises(JoinError, match="never") as caught:
        again.update(nn.Linear(2, 2))
    assert caught.value.code is RejectCode.NO_GENERATION


def test_another_model_of_the_same_name_is_refused_naming_the_tensor(server: ServerProcess, run: str) -> None:
    with _client(server, run) as client:
        client.update(nn.Linear(2, 2))

    with pytest.raises(JoinError, match="weight") as caught:
        _client(server, run, step=1).update(nn.Linear(3, 3))
    assert caught.value.code is RejectCode.MANIFEST_CHANGED


def test_resume_must_fails_without_a_run(server: ServerProcess, run: str) -> None:
    with pytest.raises(JoinError) as caught:
        _client(server, run, resume="must").update(nn.Linear(2, 2))
    assert caught.value.code is RejectCode.NOTHING_TO_CONTINUE


def test_state_dict_resumes_the_next_process_at_its_checkpoint(server: ServerProcess, run: str) -> None:
    model = Toy()
    client = _client(server, run)
    for step in range(1, 8):
        client.update(model.at(step), step)
        if step == 4:
            assert client.checkpoint(step)
            state = client.state_dict()
    assert client.flush(durable=True)
    client.close()

    with _client(server, run) as resumed:
        resumed.load_state_dict(state)
        resumed.update(model.at(5))

    with Reader(server.http) as reader:
        version = reader.version(run, "ema-0.5")
    assert (version.step, version.updates) == (5, 5)


@pytest.mark.usefixtures("lane")
def test_rewind_uses_the_newest_generation_up_to_the_step(server: ServerProcess, run: str) -> None:
    model = Toy()
    with _client(server, run) as client:
        for step in range(1, 8):
            client.update(model.at(step), step)
            if step == 3:
                assert client.flush(durable=True)

        assert client.rewind(5) == 3
        assert client.steps == 5
        client.update(model.at(6))
        assert client.flush()
        with pytest.raises(RewindError):
            client.rewind(2)

    with Reader(server.http) as reader:
        version = reader.version(run, "ema-0.5")
    assert (version.step, version.updates, version.gap_steps) == (6, 4, 2)


@pytest.mark.usefixtures("lane")
def test_client_reconnects_to_a_restarted_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    with ServerProcess(tmp_path / "data") as first:
        client = _client(first, "r", when_behind="skip")
        client.update(model.at(1), 1)
        assert client.flush(durable=True)
        first.kill()
    for step in range(2, 30):
        client.update(model.at(step), step)
    assert client.stats()["last_committed_step"] == 1

    with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address) as second:
        eventually(lambda: client.stats()["state"] == "streaming", "the client is back")
        client.update(model.at(30), 30)
        assert client.finish()
        step, weights = _raw(second, "r")
        metrics = httpx2.get(f"{second.http}/metrics").text

    assert step == 30
    assert torch.equal(weights["first.weight"], model.first.weight)
    assert client.stats()["reconnects"] == 1
    assert "ema_connections_total 1.0" in metrics.splitlines()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(";")[0] for text in warnings] == ["ema: the connection broke", "ema: connected again"]


@pytest.mark.usefixtures("lane")
def test_steps_that_a_killed_server_had_applied_are_reported_as_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Toy()
    with ServerProcess(tmp_path / "data", "--publish-every-seconds", "0") as first:
        client = _client(first, "r")
        client.update(model.at(1), 1)
        assert client.flush(durable=True)
        for step in range(2, 6):
            client.update(model.at(step), step)
        assert client.flush()
        first.kill()

    with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address):
        eventually(lambda: client.stats()["reconnects"] == 1, "the client is back")
        assert client.stats()["last_committed_step"] == 1
        client.update(model.at(6), 6)
        assert client.finish()

    text = "the server continues at step 1; 4 steps that it had applied since its last generation are lost"
    assert [text in message for message in caplog.messages if "connected again" in message] == [True]


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize("ending", ["checkpoint", "finish"])
def test_last_step_is_sent_after_the_server_returns(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Toy()
    with ServerProcess(tmp_path / "data") as first:
        client = _client(first, "r", when_behind="skip")
        client.update(model.at(1), 1)
        client.update(model.at(2), 2)
        assert client.flush(durable=True)
        first.kill()
    for step in range(3, 151):
        client.update(model.at(step), step)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(client.finish if ending == "finish" else lambda: client.checkpoint(150))
        with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address) as second:
            assert ended.result(90.0)
            client.close()
            step, weights = _raw(second, "r")

    assert step == 150
    assert torch.equal(weights["first.weight"], model.first.weight)
    waits = [message for message in caplog.messages if "waiting at most" in message]
    assert waits
    assert all(message.endswith(f"s until {first.zmq} answers again") for message in waits)


def test_checkpoint_of_an_unsent_step_is_false(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    with ServerProcess(tmp_path / "data") as first:
        client = _client(first, "r", when_behind="skip")
        client.update(model.at(2), 2)
        assert client.flush(durable=True)
        first.kill()
    for step in range(3, 20):
        client.update(model.at(step), step)
    model.at(20)  # the weights of step 19 are gone

    with ServerProcess(tmp_path / "data", zmq=first.zmq, http=first.http_address):
        eventually(lambda: client.stats()["state"] == "streaming", "the client is back")
        assert not client.checkpoint(19)
        assert "the generation holds step 2" in caplog.text
        client.update(model, 20)
        assert client.checkpoint(20)
        client.close()


def test_server_stop_after_training_logs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ServerProcess(tmp_path / "data") as server:
        client = _client(server, "r")
        client.update(nn.Linear(2, 2))
        assert client.flush()
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        eventually(lambda: client.stats()["state"] != "streaming", "the client has noticed")
        client.close()

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("listening", "hosts"),
    [
        ("[::1]", ["[::1]", "localhost"]),
        ("127.0.0.1", ["127.0.0.1", "localhost"]),
        ("[::]", ["[::1]", "127.0.0.1", "localhost"]),
    ],
)
def test_server_is_reached_over_either_address_family(tmp_path: Path, listening: str, hosts: list[str]) -> None:
    known = {place[0] for *_, place in socket.getaddrinfo("localhost", None)}
    with ServerProcess(tmp_path / "data", "--insecure", zmq=f"tcp://{listening}:0") as server:
        port = server.zmq.rpartition(":")[2]
        for host in hosts:
            if host != "localhost" or listening != "[::1]" or "::1" in known:
                EmaClient(f"tcp://{host}:{port}", "r", connect_timeout_s=20.0).close()
        EmaClient(server.zmq, "r", connect_timeout_s=20.0).close()


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize("fate", ["stopped", "killed"])
def test_silent_server_adds_nothing_to_the_time_in_the_loop(tmp_path: Path, fate: str) -> None:
    model = nn.Linear(1024, 1024)

    def blocked_s(client: EmaClient, first: int) -> list[float]:
        durations = []
        for step in range(first, first + 60):
            before = client.stats()["blocked_s_total"]
            client.update(model, step)
            durations.append(client.stats()["blocked_s_total"] - before)
            time.sleep(0.002)
        return durations

    with ServerProcess(tmp_path / "data") as server:
        client = _client(server, "r", when_behind="skip")
        client.update(model, 1)
        alive = blocked_s(client, 2)
        server.send(signal.SIGSTOP if fate == "stopped" else signal.SIGKILL)
        silent = blocked_s(client, 100)
        stats = client.stats()
        server.send(signal.SIGCONT)
        client.close(timeout_s=0.0)

    # Without waiting, a step costs a copy at most; ten of the control arm's is far below any wait of ours.
    assert statistics.median(silent) <= 10 * statistics.median(alive)
    assert sum(stats["skipped"].values()) >= 50


_FORGETFUL = """
import sys, time, torch
from torch import nn
from trainer_client import EmaClient
model = nn.Linear(512, 512)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
client = EmaClient(sys.argv[1], sys.argv[2], ["raw"], when_behind="wait")
client.attach(model, optimizer)
print("joined", flush=True)
if sys.argv[3] == "wait":
    time.sleep(1.0)
for _ in range(50):
    optimizer.zero_grad()
    model(torch.ones(8, 512)).square().mean().backward()
    optimizer.step()
if sys.argv[3] == "raise":
    raise SystemExit(3)
print("trained", flush=True)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 3)])
def test_unclosed_client_never_blocks_process_exit(server: ServerProcess, run: str, how: str, code: int) -> None:
    with Process("-c", _FORGETFUL, server.zmq, run, how) as trainer:
        assert trainer.wait() == code

    assert list(trainer.errors) == []
    eventually(lambda: server.get(f"/v1/runs/{run}")["state"] == "waiting", "the trainer has disconnected")


@pytest.mark.parametrize("fate", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_unclosed_client_of_a_lost_server_never_blocks_process_exit(tmp_path: Path, fate: signal.Signals) -> None:
    with (
        ServerProcess(tmp_path / "data") as server,
        Process("-c", _FORGETFUL, server.zmq, "r", "wait") as trainer,
    ):
        trainer.wait_line(lambda line: line == "joined")
        server.send(fate)

        assert trainer.wait() == 0
        assert not [line for line in trainer.errors if "Traceback" in line or "terminate" in line]
        server.send(signal.SIGCONT)


def test_config_and_summary_reach_the_version(server: ServerProcess, run: str) -> None:
    with _client(server, run, config={"width": 64}) as client:
        client.update(nn.Linear(2, 2))

    with Reader(server.http) as reader:
        version = reader.version(run, "raw")
        folder = reader.download(version, server.data.parent / "out")
    assert json.loads((folder / "config.json").read_text()) == {"width": 64}


@pytest.mark.parametrize("sent", [True, False], ids=["after a step", "before the first step"])
def test_changed_model_begins_a_new_run_and_sets_the_old_one_aside(server: ServerProcess, sent: bool) -> None:
    run, model = f"changed-{sent}", nn.Sequential(nn.Linear(2, 2))
    with _client(server, run, on_change="restart") as client:
        client.attach(model, optimizer := SGD(model.parameters(), lr=0.1))
        if sent:
            optimizer.step()
        model.append(nn.Linear(2, 2))
        for _ in range(2):
            optimizer.step()
        last = client.steps

    step, weights = _raw(server, run)
    assert step == last
    assert weights.keys() == model.state_dict().keys()
    if sent:
        with Reader(server.http) as reader:
            (old,) = [each.run for each in reader.runs() if each.run.startswith(f"{run}.")]
            assert reader.version(old, "raw").step == 1
            assert reader.load(reader.version(old, "raw")).keys() == {"0.weight", "0.bias"}


def test_only_rank_0_reaches_the_server(server: ServerProcess, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    clients = []
    for rank in "210":
        monkeypatch.setenv("RANK", rank)
        clients.append(_client(server, run))
    model = nn.Linear(2, 2)
    for client in clients:
        client.update(model, 1)

    assert [client.finish() for client in clients] == [True, True, True]
    assert _raw(server, run)[0] == 1


def test_a_client_with_the_defaults_gets_versions_as_often_as_it_asks_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Toy()
    with ServerProcess(tmp_path / "data", "--publish-min-seconds", "0") as server:
        client = EmaClient(server.zmq, "r", when_behind="wait", publish_every_steps=10)
        long = EmaClient(server.zmq, "long", ["ema:0.9999"], when_behind="wait")
        for step in range(1, 36):
            client.update(model.at(step), step)
            long.update(model.at(step), step)
            if step % 10 == 0:
                eventually(lambda: client.stats()["last_published_step"] == client.steps, "the step is published")
        assert client.finish()
        assert caplog.messages == []
        assert long.finish()
        versions = server.get("/v1/runs/r/averages/ema/versions")["versions"]
        average = server.get("/v1/runs/long/averages/ema-0.9999")

    assert [version["step"] for version in versions][:4] == [35, 30, 20, 10]
    assert caplog.messages == [f"ema: run long is finished: average ema-0.9999: {average['warning']}"]
    assert average["initial_share"] > 0.9
