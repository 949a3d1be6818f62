"""Snapshots through memory that trainer and server share: chosen by itself, correct after kills, and given back."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.memory_files import held, slots_of
from support.processes import SUPPORT, Process, ServerProcess
from support.recorded import Recorder
from support.waiting import eventually
from trainer_client import EmaClient, JoinError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

AVERAGES = ["raw", "ema:0.9"]


def model_at(step: int) -> nn.Linear:
    torch.manual_seed(step)
    return nn.Linear(64, 32)


@contextmanager
def streaming(server: ServerProcess, **given: Any) -> Iterator[EmaClient]:
    client = EmaClient(server.zmq, "r", AVERAGES, **{"when_behind": "wait", **given})
    try:
        yield client
    finally:
        client.close()


def test_trainer_on_the_servers_machine_shares_its_memory(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server, streaming(server) as client:
        assert client.stats()["lane"] is None
        client.update(model_at(1))
        assert client.flush()

        assert client.stats()["lane"] == "shm"
        assert server.get("/v1/runs/r")["lane"] == "shm"
        metrics = server.text("/metrics")
        assert 'ema_run_lane{lane="shm",run="r"} 1.0' in metrics
        assert 'ema_run_lane{lane="zmq",run="r"} 0.0' in metrics
        assert f"ema_shared_slot_bytes {2 * 4 * (64 * 32 + 32):.1f}" in metrics
        assert "ema_slot_bytes 0.0" in metrics
        assert "ema_chunks_total 0.0" in metrics
        assert slots_of(server.popen.pid) == slots_of() != set()
        client.close()
        eventually(lambda: server.get("/v1/runs/r")["lane"] is None, "the run has no trainer")


def test_lane_is_chosen_by_argument_or_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServerProcess(tmp_path / "data") as server:
        with streaming(server, lane="zmq") as client:
            client.update(model_at(1))
            assert client.stats()["lane"] == "zmq"
            assert not slots_of()
        monkeypatch.setenv("EMA_LANE", "zmq")
        with streaming(server, lane="shm") as client:
            client.update(model_at(2))
            assert client.stats()["lane"] == "shm"
        with streaming(server) as client:
            client.update(model_at(3))
            assert client.stats()["lane"] == "zmq"


def test_server_that_shares_no_memory_is_streamed_to_through_its_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ema")
    with ServerProcess(tmp_path / "data", "--shm-folder", "off") as server:
        with streaming(server) as client:
            client.update(model_at(1))
            assert client.flush()
            assert client.stats()["lane"] == "zmq"
        assert [line for line in caplog.messages if "shared memory" in line] == [
            "ema: snapshots go through the socket, not through shared memory: the server does not offer it (its "
            "--shm-folder is off, or its log says why)"
        ]
        with (
            streaming(server, lane="shm") as client,
            pytest.raises(JoinError, match=r"lane='shm'.*does not offer it"),
        ):
            client.update(model_at(2))


def test_trainer_that_does_not_see_the_servers_folder_uses_its_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on another machine, or in a container of its own."""
    caplog.set_level(logging.INFO, "ema")
    folder = tmp_path / "s"
    with ServerProcess(tmp_path / "data", "--shm-folder", str(folder)) as server:
        folder.rename(tmp_path / "away")
        with streaming(server) as client:
            client.update(model_at(1))
            assert client.flush()
            assert client.stats()["lane"] == "zmq"
        assert "the server is on another machine, or its folder is not shared" in caplog.text


def test_killed_server_gets_the_same_slots_again_and_loses_nothing_that_is_unanswered(tmp_path: Path) -> None:
    recorder, data = Recorder(), tmp_path / "data"
    server = ServerProcess(data)
    with streaming(server) as client:
        with server:
            for step in (1, 2, 3):
                model = model_at(step)
                recorder.record(step, model)
                client.update(model, step)
            assert client.checkpoint(3)
            slots = slots_of()
            server.send(signal.SIGSTOP)
            for step in (4, 5):  # they fill both slots, and stay unanswered
                model = model_at(step)
                recorder.record(step, model)
                client.update(model, step)
            server.kill()
        with ServerProcess(data, zmq=server.zmq, http=server.http_address) as server:
            model = model_at(6)
            recorder.record(6, model)
            eventually(lambda: client.stats()["committed"] == 5, "both are applied")
            client.update(model, 6)
            assert client.flush()

            assert client.stats()["lane"] == "shm"
            assert client.stats()["reconnects"] == 1
            assert slots_of() == slots_of(server.popen.pid) == slots
            assert client.finish()
            recorder.check(server, "r", [1, 2, 3, 4, 5, 6])


def test_lane_follows_what_a_restarted_server_offers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder, data = Recorder(), tmp_path / "data"
    server = ServerProcess(data)
    lanes = []
    with streaming(server) as client:
        for step, options in enumerate(((), ("--shm-folder", "off"), ()), start=1):
            if step > 1:
                server = ServerProcess(data, *options, zmq=server.zmq, http=server.http_address)
            with server:
                eventually(lambda: client.stats()["state"] in ("streaming", "greeted"), "the client is connected")
                model = model_at(step)
                recorder.record(step, model)
                client.update(model, step)
                assert client.checkpoint(step)
                lanes.append(client.stats()["lane"])
                if step == 3:
                    assert client.finish()
                    recorder.check(server, "r", [1, 2, 3])
                server.kill()

    assert lanes == ["shm", "zmq", "shm"]
    assert "through the socket from now on, not through shared memory: the server does not offer it" in caplog.text


@pytest.mark.parametrize("kind", ["fsdp", "columns"])
def test_ranks_share_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The files are those of a run whose snapshots are not sharded."""
    monkeypatch.setenv("EMA_LANE", "shm")
    data = tmp_path / "data"
    with ServerProcess(data) as server:
        given = {"endpoint": server.zmq, "run": "sharded", "kind": kind, "world": 2, "steps": 4}
        with Process(str(SUPPORT / "sharded_training.py"), json.dumps(given)) as process:
            assert process.wait(100.0) == 0, "\n".join(list(process.errors)[-30:])
        assert [line for line in server.errors if "run sharded: new, lane shm" in line]
        assert files_of(data, "sharded") == files_of(data, "sharded-twin")


def files_of(data: Path, run: str) -> dict[str, bytes]:
    """The weights of the newest generation of a run, by average."""
    generation = max((data / "runs" / run / "generations").iterdir())
    return {path.name: (path / "model.safetensors").read_bytes() for path in (generation / "averages").iterdir()}


@pytest.mark.parametrize("killed", ["trainer", "server", "both"])
def test_killed_processes_leave_no_memory_behind(tmp_path: Path, killed: str) -> None:
    """Also if workers of the trainer's data loader live on."""
    with ServerProcess(tmp_path / "data", "--lost-after-seconds", "5") as server:
        script = str(SUPPORT / "trainer_with_worker.py")
        with Process(script, server.zmq) as trainer:
            worker = int(trainer.wait_line(lambda line: line.startswith("worker")).split()[1])
            slots = slots_of(trainer.popen.pid)
            try:
                assert len(slots) == 2
                assert slots == slots_of(server.popen.pid)
                eventually(lambda: not slots_of(worker), "the worker has closed what it inherited")
                if killed != "trainer":
                    server.kill()
                    assert slots_of(trainer.popen.pid) == slots
                trainer.kill()
                os.kill(worker, 0)
                eventually(lambda: not slots & held(), "no process has the slots", timeout_s=60.0)
            finally:
                os.kill(worker, signal.SIGKILL)
