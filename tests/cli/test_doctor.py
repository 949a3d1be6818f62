from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import typer

from ema_cli import doctor
from ema_cli.app import build
from ema_cli.doctor import Check, State
from support.command import ema
from support.served import Served


@contextmanager
def _taken() -> Iterator[str]:
    """An address on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "ok"}'
        self.send_response(200 if self.path == "/healthz" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@contextmanager
def _server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _free() -> str:
    with _taken() as address:
        return address


def _found(checks_: tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks_ if check.name == name)


def test_working_machine_has_no_problem(tmp_path: Path) -> None:
    examined = doctor.examine(f"tcp://{_free()}", _free(), tmp_path)

    assert [check for check in examined if check.state is State.PROBLEM] == []


def test_taken_address_exits_1_with_advice(tmp_path: Path) -> None:
    with _taken() as address:
        result = ema("doctor", "--http", address, "--zmq", f"tcp://{_free()}", "--data", str(tmp_path), "--json")

    report = json.loads(result.stdout)
    problems = [check for check in report["checks"] if check["state"] == "problem"]
    assert [problem["name"] for problem in problems] == ["http address"]
    assert "--http" in problems[0]["advice"]
    assert (report["ok"], result.returncode) == (False, 1)


def test_success_exits_0_with_a_line_for_each_check(tmp_path: Path) -> None:
    result = ema("doctor", "--http", _free(), "--zmq", f"tcp://{_free()}", "--data", str(tmp_path))

    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) == len(doctor.examine("tcp://127.0.0.1:0", "127.0.0.1:0", tmp_path))


def test_address_of_a_running_ema_server_is_no_problem(tmp_path: Path) -> None:
    with _server() as address:
        examined = doctor.examine(f"tcp://{_free()}", address, tmp_path)

    assert _found(examined, "http address").state is State.OK
    assert "running" in _found(examined, "http address").found


def test_invalid_address_is_a_problem() -> None:
    for address in ("127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", "192.0.2.1:0"):
        assert doctor.tcp_address("http", address, server_answers=False).state is State.PROBLEM, address


def test_unwritable_folder_is_a_problem() -> None:
    found = tuple(doctor.disk(Path("/proc")))

    assert _found(found, "durable write").state is State.PROBLEM


def test_missing_folder_is_judged_by_its_parent(tmp_path: Path) -> None:
    found = tuple(doctor.disk(tmp_path / "not" / "yet"))

    assert str(tmp_path) in _found(found, "disk").found
    assert _found(found, "durable write").state is State.OK
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_a_note_that_names_its_extra() -> None:
    result = ema("doctor", "--zmq", f"tcp://{_free()}", "--http", _free(), "--json", missing=["torch", "zmq"])

    report = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert report["gpu"]["state"] == report["libzmq"]["state"] == "note"
    assert result.returncode == 0


def test_server_is_checked_by_its_url(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", token="s3cret")
    with served.listening() as url:
        unready = ema("doctor", "--url", url, "--token", "s3cret", "--json")
        served.beat()
        ready = ema("doctor", "--url", url, "--token", "s3cret")
        without = ema("doctor", "--url", url)
    served.close()
    nowhere = ema("doctor", "--url", url)

    failing = {check["name"] for check in json.loads(unready.stdout)["checks"] if check["state"] == "problem"}
    assert (unready.returncode, ready.returncode, without.returncode, nowhere.returncode) == (1, 0, 1, 1)
    assert {"server", "ingest", "averager"} <= failing
    assert f"server: {url} is ready" in ready.stdout
    assert "runs: 0 on this server" in ready.stdout
    assert "requires a token" in without.stdout
    assert "nothing answers" in nowhere.stdout


def test_doctor_defaults_are_those_of_the_server() -> None:
    group: Any = typer.main.get_command(build())
    defaults = [{param.name: param.default for param in group.commands[name].params} for name in ("doctor", "serve")]

    for name in ("zmq", "http", "data"):
        assert defaults[0][name] == defaults[1][name]
