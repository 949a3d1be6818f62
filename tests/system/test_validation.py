"""Validation with processes that are really killed: results arrive, averages are unaffected, and no process remains."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from ema_reader import Reader, Unreachable, Validation
from support.command import ema
from support.processes import Process, ServerProcess
from support.toy import Toy
from support.waiting import eventually
from trainer_client import EmaClient

WAIT_S = 60.0
AVERAGES = ("raw", "ema-0.9")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the evaluation functions record their state."""
    folder = tmp_path / "evaluations"
    folder.mkdir()
    monkeypatch.setenv("EVALUATIONS", str(folder))
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "plain") as server:
        yield server


def evaluating(data: Path, function: str) -> ServerProcess:
    return ServerProcess(data, "--evaluate", f"support.evaluations:{function}")


def own_address() -> str:
    """An address of this machine other than the loopback, if it has one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def train(server: ServerProcess, *steps: int) -> dict[str, str]:
    """Send the toy's weights of these steps and publish; the versions' ids by average, which tell their content."""
    with EmaClient(server.zmq, "toy", ["raw", "ema:0.9"], when_behind="wait", step=steps[0] - 1) as client:
        for step in steps:
            client.update(Toy().at(step), step)
        assert client.flush(WAIT_S)
        httpx2.post(f"{server.http}/v1/runs/toy/versions", timeout=WAIT_S).raise_for_status()
    with Reader(server.http) as reader:
        return {name: reader.version("toy", name).id for name in AVERAGES}


def ask(server: ServerProcess, average: str = "raw") -> tuple[int, str]:
    """Ask for a validation: status and place of the result."""
    answer = httpx2.post(f"{server.http}/v1/runs/toy/validations", json={"average": average}, timeout=WAIT_S)
    return answer.status_code, answer.url.join(answer.headers.get("location", "")).path


def evaluate(server: ServerProcess, function: str, name: str, *options: str) -> Process:
    address = ("--url", server.http, "--worker", name, "--poll-s", "0.1")
    return Process("-m", "ema_cli", "evaluate", f"support.evaluations:{function}", *address, *options)


def at_work(folder: Path, known: set[int] | None = None) -> int:
    """The process that has begun to evaluate, other than those known."""

    def begun() -> set[int]:
        return {int(path.stem) for path in folder.glob("*.pid")} - (known or set())

    eventually(lambda: bool(begun()), "an evaluation begins", WAIT_S)
    return begun().pop()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def validated(server: ServerProcess, average: str) -> Validation:
    with Reader(server.http) as reader:
        return reader.validate("toy", average, timeout_s=WAIT_S)


def workers(server: ServerProcess) -> list[str | None]:
    """Who has reported."""
    with Reader(server.http) as reader:
        return [row.worker for row in reader.metrics("toy")]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", own_address()])
def test_servers_evaluator_uses_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": ""}
    with monkeypatch.context() as environment:
        for name, value in proxies.items():
            environment.setenv(name, value)
            environment.setenv(name.lower(), value)
        options = ("--insecure", "--evaluate", "support.evaluations:bias")
        server = ServerProcess(tmp_path / "data", *options, http=f"{host}:0")
    with server:
        train(server, 1)
        eventually(lambda: set(workers(server)) == {"server"}, "the versions are evaluated", WAIT_S)


def test_killed_evaluator_is_restarted_and_averages_do_not_change(
    tmp_path: Path, folder: Path, plain: ServerProcess
) -> None:
    with evaluating(tmp_path / "data", "gated") as server:
        first = train(server, *range(1, 31))
        killed = at_work(folder)
        status, place = ask(server)
        os.kill(killed, signal.SIGKILL)
        second = train(server, *range(31, 61))
        successor = at_work(folder, {killed})
        (folder / "go").touch()
        answer = httpx2.get(server.http + place, headers={"Prefer": "wait=60"}, timeout=90).json()
        newest = [validated(server, name) for name in AVERAGES]

    assert status == 202
    assert (answer["state"], answer["version"], answer["samples"], answer["error"]) == ("done", first["raw"], 7, None)
    assert answer["metrics"] == {"bias": pytest.approx(Toy().at(30).first.bias[0].item())}
    assert successor != killed
    assert {item.average: item.version for item in newest} == second
    assert first == train(plain, *range(1, 31))
    assert second == train(plain, *range(31, 61))


def test_evaluator_takes_the_runs_of_its_server_and_older_ones_on_request(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        train(server, 1)
    with evaluating(tmp_path / "data", "bias") as server, Reader(server.http) as reader:
        with EmaClient(server.zmq, "young", ["raw"]) as client:  # its name comes after the old one's
            client.update(Toy().at(1), 1)
            assert client.finish(timeout_s=WAIT_S)
        eventually(lambda: bool(reader.metrics("young")), "the young run is evaluated", WAIT_S)
        unasked = reader.metrics("toy")
        asked = validated(server, "raw")

    assert unasked == ()
    assert asked.state == "done"


def test_version_of_a_killed_worker_is_taken_over_and_evaluated_once(plain: ServerProcess, folder: Path) -> None:
    versions = train(plain, 1, 2, 3)
    with evaluate(plain, "gated", "first", "--lease-s", "1") as first:
        pid = at_work(folder)
        with evaluate(plain, "gated", "second", "--lease-s", "30") as second:
            both = at_work(folder, {pid})  # the second has the other average
            first.kill()
            (folder / "go").touch()
            found = {name: validated(plain, name) for name in AVERAGES}
            second.kill()

    with Reader(plain.http) as reader:
        rows = reader.metrics("toy")
    assert (pid, both) == (first.popen.pid, second.popen.pid)
    assert {name: item.version for name, item in found.items()} == versions
    assert sorted((row.average, row.worker) for row in rows) == [("ema-0.9", "second"), ("raw", "second")]


def test_two_workers_share_the_versions_of_a_run_and_both_end_with_it(plain: ServerProcess, folder: Path) -> None:
    (folder / "go").touch()
    with evaluate(plain, "gated", "a", "--run", "toy") as a, evaluate(plain, "gated", "b", "--run", "toy") as b:
        with EmaClient(plain.zmq, "toy", [f"ema:0.{digit}" for digit in range(1, 9)]) as client:
            client.update(Toy().at(1), 1)
            assert client.finish(timeout_s=WAIT_S)
        codes = [a.wait(WAIT_S), b.wait(WAIT_S)]

    with Reader(plain.http) as reader:
        rows = reader.metrics("toy")
    assert codes == [0, 0]
    assert len(rows) == len({row.version for row in rows}) == 8


def test_stopped_worker_returns_its_version_at_once(plain: ServerProcess, folder: Path) -> None:
    train(plain, 1)
    with evaluate(plain, "gated", "first", "--lease-s", "900") as first:
        at_work(folder)
        first.send(signal.SIGTERM)
        code = first.wait(WAIT_S)
    (folder / "go").touch()
    with evaluate(plain, "gated", "second", "--lease-s", "900"):
        eventually(lambda: len(workers(plain)) == len(AVERAGES), "both averages have metrics", WAIT_S)

    assert code == 128 + signal.SIGTERM
    assert set(workers(plain)) == {"second"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_evaluator_ends_with_the_server_in_every_case(
    tmp_path: Path, folder: Path, number: signal.Signals, code: int
) -> None:
    with evaluating(tmp_path / "data", "gated") as server:
        train(server, 1)
        child = at_work(folder)
        server.send(number)
        ended = server.wait(WAIT_S)
        eventually(lambda: not is_alive(child), "the evaluator ends")

    assert ended == code


def test_evaluator_that_ignores_sigterm_does_not_block_the_server(tmp_path: Path, folder: Path) -> None:
    with ServerProcess(tmp_path / "data", "--evaluate", "support.evaluations:stubborn") as server:
        versions = train(server, 1)
        child = at_work(folder)
        server.send(signal.SIGTERM)
        ended = server.wait(WAIT_S)

    assert ended == 0
    assert not is_alive(child)
    assert len(versions) == len(AVERAGES)


def test_server_on_all_addresses_is_reached_by_its_evaluator(tmp_path: Path) -> None:
    options = ("--evaluate", "support.evaluations:bias", "--insecure")
    with ServerProcess(tmp_path / "data", *options, http="0.0.0.0:0") as server:
        train(server, 1)
        found = validated(server, "raw")

    assert (found.state, found.worker) == ("done", "server")


def test_functions_error_text_is_the_result_and_the_command_exits_with_1(tmp_path: Path) -> None:
    with evaluating(tmp_path / "data", "fails") as server:
        train(server, 1)
        done = ema("validate", "toy/ema-0.9", "--url", server.http, "--timeout-s", str(WAIT_S))

    assert done.returncode == 1
    assert "FAILED: ValueError: the data set has no labels" in done.stdout
    assert "Traceback" not in done.stderr


def test_function_that_kills_its_process_is_abandoned_and_averaging_continues(tmp_path: Path) -> None:
    with evaluating(tmp_path / "data", "dies") as server:
        train(server, 1)
        found = validated(server, "raw")
        train(server, 2, 3)

    assert found.state == "failed"
    assert "vanished 3 times" in str(found.error)


def test_evaluator_that_cannot_start_reports_why_and_affects_only_its_results(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", "--evaluate", "no_such_module_here:f") as server:
        train(server, 1)
        status, place = ask(server)
        eventually(lambda: "exit code 2" in str(server.get(place)["note"]), "the note says why")
        ready = httpx2.get(f"{server.http}/readyz", timeout=WAIT_S).status_code

    assert (status, ready) == (202, 200)
    assert any("cannot import 'no_such_module_here'" in line for line in server.errors)


def test_reader_without_an_evaluator_learns_how_to_start_one(plain: ServerProcess) -> None:
    train(plain, 1)
    with Reader(plain.http) as reader, pytest.raises(Unreachable, match="--evaluate module:function"):
        reader.validate("toy", "raw")


def test_token_reaches_the_evaluator_and_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMA_TOKEN", "s3cret-of-the-test")
    with evaluating(tmp_path / "data", "bias") as server:
        with EmaClient(server.zmq, "toy", ["raw"], token="s3cret-of-the-test") as client:
            client.update(Toy().at(1), 1)
            assert client.finish(timeout_s=WAIT_S)
        with Reader(server.http, "s3cret-of-the-test") as reader:
            found = reader.validate("toy", "raw", timeout_s=WAIT_S)
        lines = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_ours(path)]

    assert found.state == "done"
    assert not any("s3cret" in line for line in [*lines, *server.errors])


def _is_ours(path: Path) -> bool:
    try:
        return "ema_cli" in path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
