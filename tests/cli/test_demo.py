"""The demo with real processes and real data; then the commands that it prints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

_STEPS = 300
_WAIT_S = 90.0
_ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}


def _demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ema_cli", "demo", "--dir", "demos", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=_ENVIRONMENT)


def _children(parent: int) -> dict[int, str]:
    """Process ids and command lines of the processes that `parent` started."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended in the meantime
    return found


def _await_child(demo: subprocess.Popen[str], words: str) -> int:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and demo.poll() is None:
        for pid, command in _children(demo.pid).items():
            if words in command:
                return pid
        time.sleep(0.05)
    raise AssertionError(f"the demo never started {words!r}: {demo.communicate(timeout=_WAIT_S)}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The folder and the output of a finished demo, and the JSON of another one."""
    folder = tmp_path_factory.mktemp("demo")
    outputs = []
    for arguments in (("--steps", str(_STEPS)), ("--steps", str(_STEPS), "--json")):
        demo = _demo(folder, *arguments)
        output, errors = demo.communicate(timeout=_WAIT_S)
        assert demo.returncode == 0, errors
        outputs.append(output)
    return folder, outputs[0], json.loads(outputs[1])


def test_every_average_is_complete_and_equals_its_replay(finished: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, report = finished

    assert [result["average"] for result in report["results"]] == ["raw", "ema-0.9", "ema-0.99", "ema-0.999"]
    assert (report["applied"], report["gap_steps"]) == (_STEPS, 0)
    eps = torch.finfo(torch.float32).eps
    for result in report["results"]:
        assert (result["step"], result["updates"], result["gap_steps"]) == (_STEPS, _STEPS, 0)
        # An update rounds by at most two eps of the tensor's values, and it decays within 1 / (1 - decay) steps.
        decay = float(result["average"].partition("-")[2] or 0)
        assert result["difference"] <= (0.0 if decay == 0 else 2 * eps / (1 - decay))
        assert 0.05 < result["accuracy"] <= 1.0


def test_table_shows_the_measurements(finished: tuple[Path, str, dict[str, Any]]) -> None:
    _, printed, report = finished

    for result in report["results"]:
        row = next(line for line in printed.splitlines() if re.search(rf"\b{result['average']}( |$)", line))
        assert re.search(rf"\b{_STEPS}\b.*\b{_STEPS}\b.*\b0\b.*\d\.\d%", row), row
    assert f"{_STEPS} steps taken, {_STEPS} updates applied, 0 gaps" in printed


def test_large_record_is_deleted_and_the_data_kept(finished: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, _ = finished

    assert sorted(path.name for path in (folder / "demos").iterdir()) == ["1", "2"]
    assert not (folder / "demos" / "1" / "record").exists()
    assert (folder / "demos" / "1" / "data" / "format.json").exists()


@contextmanager
def _served(folder: Path, arguments: list[str]) -> Iterator[str]:
    """The server started as the demo prints it, on free ports; its HTTP address."""
    ports = ["--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
    command = [sys.executable, "-m", "ema_cli", *arguments, *ports]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["http"]
        finally:
            server.terminate()
            server.communicate(timeout=_WAIT_S)


def test_printed_commands_fetch_the_checkpoint(finished: tuple[Path, str, dict[str, Any]]) -> None:
    folder, printed, _ = finished
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("  ")]
    serve, download, curl, validate = (line for line in lines if line and line[0] in ("ema", "curl"))

    with _served(folder, serve[1:]) as url:
        here = [argument.replace("http://127.0.0.1:8080", url) for argument in download[1:]]
        subprocess.run([sys.executable, "-m", "ema_cli", *here], cwd=folder, check=True, timeout=_WAIT_S)
        there = [argument.replace("http://127.0.0.1:8080", url) for argument in curl]
        subprocess.run([*there, "--silent", "--noproxy", "*"], cwd=folder, check=True, timeout=_WAIT_S)

        again = [argument.replace("http://127.0.0.1:8080", url) for argument in validate[1:]]
        ema = [sys.executable, "-m", "ema_cli", *again, "--json"]
        output = subprocess.run(ema, cwd=folder, check=True, timeout=_WAIT_S, capture_output=True, text=True).stdout

    validated = json.loads(output)
    about = json.loads((folder / "best" / "version.json").read_text())
    assert (validated["state"], validated["version"], validated["samples"]) == ("done", about["id"], 897)
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("best/model.safetensors", "model.safetensors")
    ]
    assert digests == [about["files"][0]["sha256"]] * 2
    assert about["step"] == _STEPS


@pytest.mark.parametrize(
    ("words", "name"),
    [("ema_cli.demo.train", "trainer"), (" serve ", "server"), (" evaluate ", "evaluation worker")],
)
def test_killed_process_ends_the_demo_with_its_name(tmp_path: Path, words: str, name: str) -> None:
    demo = _demo(tmp_path, "--steps", "1000000")
    _await_child(demo, " evaluate ")  # the last of the three
    os.kill(_await_child(demo, words), signal.SIGKILL)
    _, errors = demo.communicate(timeout=_WAIT_S)

    assert demo.returncode == 1
    assert f"the {name} was killed by SIGKILL" in errors
    assert "Traceback" not in errors.partition("the end of")[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_demo_leaves_no_process(tmp_path: Path, number: signal.Signals, code: int) -> None:
    demo = _demo(tmp_path, "--steps", "1000000")
    _await_child(demo, " evaluate ")
    started = _children(demo.pid)
    demo.send_signal(number)
    demo.communicate(timeout=_WAIT_S)

    assert demo.returncode == code
    assert len(started) == 3
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
