"""A full or read-only disk, or a newer data folder: averaging continues, errors are reported, free space ends them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file

from ema_reader import Reader
from support.processes import Process, ServerProcess
from support.small_disk import SmallDiskProcess, can_mount
from support.toy import Toy, check_version, ledger_steps
from support.waiting import eventually
from trainer_client import EmaClient

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _namespaces(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this system does not allow mounting a file system in a user namespace")


def get(url: str) -> tuple[int, Any]:
    response = httpx2.get(url, timeout=WAIT_S)
    return response.status_code, response.json()


def test_full_disk_stops_only_publishing_until_space_is_freed(tmp_path: Path) -> None:
    with SmallDiskProcess(tmp_path / "data", "size=96m") as server:
        ready = server.ready()
        run_url, ready_url = f"{ready['http']}/v1/runs/r", f"{ready['http']}/readyz"
        with EmaClient(ready["zmq"], "r", ["raw", "ema:0.9"], when_behind="wait") as client:
            client.update(Toy().at(1), 1)
            assert client.flush(WAIT_S, durable=True)
            assert get(ready_url)[0] == 200

            ballast = server.fill()
            for step in range(2, 31):
                client.update(Toy().at(step), step)
            assert not client.flush(WAIT_S, durable=True), "nothing can be durable"
            assert client.stats()["committed"] == 30, "averaging goes on"
            status = get(run_url)[1]
            assert (status["step"], status["published_step"]) == (30, 1)
            assert "No space left on device" in status["publish_error"]
            code, answer = get(ready_url)
            assert code == 503
            assert not answer["checks"]["disk"]["ok"]
            assert "run r: " in answer["checks"]["publishing"]["detail"]
            assert "No space left on device" in answer["checks"]["publishing"]["detail"]
            answer = httpx2.post(f"{run_url}/versions", timeout=WAIT_S)
            assert answer.status_code == 503
            assert "No space left on device" in answer.text
            with Reader(ready["http"]) as reader:
                old = reader.download(reader.version("r", "raw"), tmp_path / "old")
            assert load_file(old / "model.safetensors"), "what is published is served"

            ballast.unlink()
            eventually(lambda: get(run_url)[1]["published_step"] == 30, "published again without a request")
            assert get(run_url)[1]["publish_error"] is None
            assert get(ready_url)[0] == 200
        with Reader(ready["http"]) as reader:
            about = check_version(reader.download(reader.version("r", "ema-0.9"), tmp_path / "new"))
        assert list(ledger_steps(about["ledger"])) == list(range(1, 31))
        server.send(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0


def test_unpublished_steps_at_stop_exit_with_1(tmp_path: Path) -> None:
    with SmallDiskProcess(tmp_path / "data", "size=96m") as server:
        client = EmaClient(server.ready()["zmq"], "r", ["raw"])
        client.update(Toy().at(1), 1)
        assert client.flush(WAIT_S)
        server.fill()
        server.send(signal.SIGINT)
        code = server.wait(WAIT_S)
        client.close()

    assert code == 1
    assert any("No space left on device" in line for line in server.errors)
    assert not any("Traceback" in line for line in server.errors), list(server.errors)


_FILL = 'dd if=/dev/zero of="$0/ballast" bs=4k >/dev/null 2>&1'


def test_full_disk_at_first_start_is_one_line(tmp_path: Path) -> None:
    with SmallDiskProcess(tmp_path / "data", "size=256k", _FILL) as server:
        code = server.wait(WAIT_S)

    assert (code, list(server.lines)) == (1, [])
    assert len(server.errors) == 1, list(server.errors)
    assert "No space left on device" in server.errors[0] or "full" in server.errors[0]
    assert str(tmp_path / "data") in server.errors[0]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The data folder of a stopped server, with one run."""
    with ServerProcess(tmp_path / "written") as server:
        with EmaClient(server.zmq, "r", ["raw", "ema:0.9"], when_behind="wait") as client:
            for step in range(1, 4):
                client.update(Toy().at(step), step)
        server.send(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
    return tmp_path / "written"


def test_full_disk_at_restart_is_one_line_and_loses_nothing(tmp_path: Path, written: Path) -> None:
    """A supervisor that restarts the server succeeds once there is free space."""
    prepare = f'cp -r {written}/. "$0"; {_FILL}; {sys.executable} -m ema_cli serve --data "$0" --http 127.0.0.1:0'
    with SmallDiskProcess(
        tmp_path / "data", "size=4m", f'{prepare} --zmq tcp://127.0.0.1:0; rm "$0/ballast"'
    ) as server:
        ready = server.ready()
        refused = list(server.errors)
        with Reader(ready["http"]) as reader:
            about = check_version(reader.download(reader.version("r", "ema-0.9"), tmp_path / "out"))

    assert len([line for line in refused if line.startswith("ema serve: ")]) == 1
    assert "No space left on device; make room" in refused[0]
    assert about["step"] == 3


def test_read_only_data_folder_is_one_line(tmp_path: Path, written: Path) -> None:
    prepare = f'cp -r {written}/. "$0"'
    with SmallDiskProcess(tmp_path / "data", "size=8m", prepare, remount="ro") as server:
        code = server.wait(WAIT_S)

    assert (code, list(server.lines)) == (1, [])
    assert len(server.errors) == 1, list(server.errors)
    assert "Read-only file system" in server.errors[0]
    assert "--data" in server.errors[0]


def test_newer_data_format_is_one_line_and_unchanged(tmp_path: Path, written: Path) -> None:
    (written / "format.json").write_text('{"format": 2}\n')
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*") if path.name != "LOCK"}
    with Process("-m", "ema_cli", "serve", "--data", str(written), "--http", "127.0.0.1:0") as server:
        code = server.wait(WAIT_S)

    assert (code, list(server.lines), len(server.errors)) == (1, [], 1)
    assert "format 2" in server.errors[0]
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*") if path.name != "LOCK"} == before
