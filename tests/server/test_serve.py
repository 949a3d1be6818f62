"""`ema serve` as a process: what it prints, how it starts and stops, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from ema_cli.app import build, run
from ema_reader import NotFound, Reader, Version
from support.processes import Process, ServerProcess
from support.toy import Toy
from trainer_client import EmaClient

pytestmark = pytest.mark.process

WAIT_S = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "data", "--keep-generations", "1") as process:
        yield process


def client_of(server: ServerProcess, **settings: Any) -> EmaClient:
    return EmaClient(server.zmq, "r", ["raw", "ema:0.5"], when_behind="wait", **settings)


def send(client: EmaClient, *steps: int) -> None:
    for step in steps:
        client.update(Toy().at(step), step)
    assert client.flush(WAIT_S)


def publish(server: ServerProcess) -> tuple[int, Any]:
    response = httpx2.post(f"{server.http}/v1/runs/r/versions", timeout=WAIT_S)
    return response.status_code, response.json()


def test_ready_server_prints_one_line_of_json_and_logs_elsewhere(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", "--log-level", "debug") as server:
        status = httpx2.get(f"{server.http}/readyz", timeout=WAIT_S).status_code
        server.send(signal.SIGTERM)
        code = server.wait(WAIT_S)

    ready = json.loads(server.lines[0])
    assert (status, code, len(server.lines)) == (200, 0, 1)
    assert sorted(ready) == ["data", "device", "http", "pid", "zmq"]
    assert (ready["pid"], ready["data"], ready["device"]) == (server.popen.pid, str(tmp_path / "data"), "cpu")
    assert not any("Traceback" in line for line in server.errors)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_publishes_applied_steps_and_a_restart_serves_them(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(tmp_path / "data") as server:
        client = client_of(server)
        send(client, 1, 2, 3)
        server.send(number)
        code = server.wait(WAIT_S)
    client.close(timeout_s=0.1)

    with ServerProcess(tmp_path / "data") as server, Reader(server.http) as reader:
        weights = reader.load(reader.version("r", "raw", "step-3"))
        state = reader.run("r").state

    expected = Toy().at(3).state_dict()
    assert (code, state) == (0, "waiting")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_publish_answers_durable_versions_and_then_nothing_new(server: ServerProcess) -> None:
    with client_of(server) as client:
        send(client, 1)
        first, again = publish(server), publish(server)
        send(client, 2)
        later = publish(server)

    assert [first[0], again[0], later[0]] == [201, 200, 201]
    assert [version["average"] for version in first[1]["versions"]] == ["raw", "ema-0.5"]
    assert again[1] == first[1]
    assert later[1]["step"] == 2


def test_failed_publish_is_answered_with_the_reason_and_later_succeeds(
    server: ServerProcess,
) -> None:
    generations = server.data / "runs" / "r" / "generations"
    with client_of(server) as client:
        send(client, 1)
        shutil.rmtree(generations)
        generations.touch()
        failed = publish(server)
        status = server.get("/v1/runs/r")
        generations.unlink()
        generations.mkdir()
        healed = publish(server)

    assert (failed[0], failed[1]["code"]) == (503, "publish_failed")
    assert status["publish_error"] is not None
    assert healed[0] == 201


def test_version_outlives_its_retention_during_a_download(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server) as client, Reader(server.http) as reader:
        for step in (1, 2):  # the first stays anyway
            send(client, step)
            publish(server)
        version, unread = reader.version("r", "raw"), reader.version("r", "ema-0.5")
        _read_a_part(server, version)
        for step in (3, 4, 5):
            send(client, step)
            publish(server)
        folder = reader.download(version, tmp_path / "out")
        held = [item.step for item in reader.versions("r", "raw")]

    assert (folder / "model.safetensors").stat().st_size == version.files[0].size
    assert held == [5, 2, 1]
    assert unread.step == 2


def test_versions_beyond_the_retention_are_pruned(server: ServerProcess) -> None:
    with client_of(server) as client, Reader(server.http) as reader:
        for step in (1, 2, 3):
            send(client, step)
            publish(server)
        with pytest.raises(NotFound):
            reader.version("r", "raw", "step-2")

        assert [version.step for version in reader.versions("r", "raw")] == [3, 1]


def test_rerun_under_the_same_name_starts_without_old_metrics(server: ServerProcess) -> None:
    with client_of(server) as client, Reader(server.http) as reader:
        send(client, 1)
        publish(server)
        old = reader.version("r", "raw")
        reader.report(old, {"accuracy": 0.5})
    with client_of(server, resume="never") as client, Reader(server.http) as reader:
        send(client, 1)
        (aside,) = (run.run for run in reader.runs() if run.run != "r")
        rows, rows_aside = reader.metrics("r"), reader.metrics(aside)

    assert rows == ()
    assert [row.version for row in rows_aside] == [old.id]


def test_second_server_on_the_same_folder_is_refused_in_one_line(server: ServerProcess) -> None:
    options = ("--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(server.data))
    with Process("-m", "ema_cli", "serve", *options) as second:
        code = second.wait(WAIT_S)

    assert (code, len(second.lines), len(second.errors)) == (1, 0, 1)
    assert str(server.popen.pid) in second.errors[0]


def test_http_address_in_use_is_refused_in_one_line(server: ServerProcess, tmp_path: Path) -> None:
    options = ("--zmq", "tcp://127.0.0.1:0", "--http", server.http_address, "--data", str(tmp_path / "other"))
    with Process("-m", "ema_cli", "serve", *options) as second:
        code = second.wait(WAIT_S)

    problems = [line for line in second.errors if " INFO " not in line]
    assert (code, len(problems)) == (1, 1)
    assert server.http_address in problems[0]


def test_failed_start_leaves_no_folder(server: ServerProcess, tmp_path: Path) -> None:
    """A folder that the server made; an existing one stays with its content."""
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    addresses = {"--zmq": "tcp://127.0.0.1:0", "--http": "127.0.0.1:0"}
    for data, taken in ((new / "deeper", {"--http": server.http_address}), (kept, {"--zmq": server.zmq})):
        options = [word for option in {**addresses, **taken}.items() for word in option]
        with Process("-m", "ema_cli", "serve", *options, "--data", str(data)) as second:
            assert second.wait(WAIT_S) == 1

    assert not new.exists()
    assert (kept / "notes.txt").read_text() == "mine"


def test_token_protects_both_sockets_and_is_never_logged(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Process(
        *("-m", "ema_cli", "serve", "--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)),
        *("--log-level", "debug"),
        env={"EMA_TOKEN": "s3cret"},
    ) as server:
        ready = json.loads(server.wait_line(lambda line: line.startswith("{")))
        codes = [httpx2.get(f"{ready['http']}{path}", timeout=WAIT_S).status_code for path in ("/v1/runs", "/healthz")]
        with Reader(ready["http"], token="s3cret") as reader:
            runs = reader.runs()
        with EmaClient(ready["zmq"], "r", ["raw"], token="s3cret") as client:
            client.update(Toy().at(1), 1)
        server.send(signal.SIGTERM)
        code = server.wait(WAIT_S)

    assert (codes, runs, code) == ([401, 200], (), 0)
    assert not any("s3cret" in line for line in [*server.lines, *server.errors])


@pytest.mark.parametrize(
    ("options", "environ", "says"),
    [
        (["--http", "nonsense"], {}, "HOST:PORT"),
        (["--zmq", "udp://x"], {}, "tcp://HOST:PORT"),
        (["--http", "0.0.0.0:0"], {}, "EMA_TOKEN"),
        (["--keep-generations", "many"], {}, "Invalid value for '--keep-generations'"),
        (["--publish-every-seconds", "nan"], {}, "publish_every_seconds"),
        (["--log-level", "loud"], {}, "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        ([], {"EMA_KEEP_GENERATIONS": "0"}, "keep_generations is 0"),
        ([], {"EMA_PUBLISH_EVERY_STEPS": "-1"}, "publish_every_steps is -1"),
        ([], {"EMA_LOST_AFTER_SECONDS": "soon"}, "EMA_LOST_AFTER_SECONDS"),
        ([], {"EMA_CHUNK_BYTES": "1"}, "chunk_bytes is 1"),
        ([], {"EMA_ZMQ": "tcp://0.0.0.0:1"}, "EMA_TOKEN"),
        ([], {"EMA_TOKEN": "with space"}, "token"),
    ],
)
def test_invalid_setting_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    environ: Mapping[str, str],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ema", "serve", *options])
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)

    code = run(build())
    output = capsys.readouterr()

    assert (code, output.out, len(output.err.splitlines())) == (2, "", 1)
    assert says in output.err


def _read_a_part(server: ServerProcess, version: Version) -> None:
    path = f"/v1/runs/r/averages/{version.average}/versions/{version.id}/files/model.safetensors"
    part = httpx2.get(f"{server.http}{path}", headers={"Range": "bytes=0-99"}, timeout=WAIT_S)
    assert part.status_code == 206
