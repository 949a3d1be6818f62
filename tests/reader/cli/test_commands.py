"""The reading commands: their output and exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader.errors import UsageError
from ema_reader.targets import parse_target
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served

NOWHERE = "http://127.0.0.1:1"
EVALUATION = """
def evaluate(state):
    return {"bias": state["bias"][0]}

def fails(state):
    raise ValueError("no data")
"""


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


def ema(*arguments: str | Path) -> Done:
    """Run a command in this process, which is faster."""
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments])
    return Done(result.exit_code, result.stdout, result.stderr)


def process(*arguments: str | Path, cwd: Path) -> Done:
    """Run a command as a process of its own."""
    command = [sys.executable, "-m", "ema_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * WAIT_S, check=False, cwd=cwd)
    return Done(done.returncode, done.stdout, done.stderr)


def test_status_and_versions_print_tables_or_json(served: Served, url: str, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"]).versions[0]

    table = ema("status", "--url", url)
    status = json.loads(ema("status", "digits", "--url", url, "--json").stdout)
    listed = ema("versions", "digits", "--url", url)
    versions = json.loads(ema("versions", "digits/raw", "--url", url, "--json").stdout)

    assert table.returncode == 0
    assert table.stdout.splitlines()[1].split()[:3] == ["digits", "active", "100"]
    assert status["runs"][0]["averages"][0]["name"] == "raw"
    assert version.id[:12] in listed.stdout
    assert version.id not in listed.stdout
    assert listed.stdout.split()[:5] == ["average", "step", "id", "updates", "gap_steps"]
    assert [item["id"] for item in versions["versions"]] == [version.id]


def test_download_prints_only_the_folder(
    served: Served, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.publish("digits", 100, ["raw"])

    monkeypatch.chdir(tmp_path)
    done = ema("download", "digits/raw@step-100", "--url", url)
    result = ema("download", "digits/raw", "-o", tmp_path / "out", "--url", url, "--json")

    assert (done.returncode, done.stdout, done.stderr) == (0, "digits-raw-step-100\n", "")
    assert (tmp_path / "digits-raw-step-100" / "model.safetensors").is_file()
    assert json.loads(result.stdout)["path"] == str(tmp_path / "out")
    assert json.loads(result.stdout)["version"]["step"] == 100


@pytest.mark.process
def test_flipped_byte_exits_with_6_and_leaves_no_file(served: Served, url: str, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"]).versions[0]
    path = version.folder / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)

    done = process("download", "digits/raw", "-o", "out", "--url", url, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (6, "")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "nope"], 3),
        (["versions", "digits/nope"], 3),
        (["download", "digits/raw@step-7"], 3),
        (["download", "digits"], 2),
        (["evaluate", "nonsense", "--run", "digits"], 2),
        (["evaluate", "no_such_module:f", "--run", "digits"], 2),
        (["evaluate", "json:dumps", "--run", "digits", "--averages", "nope"], 3),
    ],
)
def test_failure_is_one_line_on_stderr_and_an_exit_code(
    served: Served, url: str, tmp_path: Path, arguments: list[str], code: int
) -> None:
    served.publish("digits", 100, ["raw"])

    done = ema(*arguments, "--url", url)

    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ema: ")


@pytest.mark.parametrize("command", [["status"], ["versions", "a/b"], ["download", "a/b"]])
def test_missing_server_exits_with_5(command: list[str], tmp_path: Path) -> None:
    done = ema(*command, "--url", NOWHERE)

    assert done.returncode == 5
    assert NOWHERE in done.stderr


def test_wrong_token_exits_with_4_and_is_never_shown(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", token="s3cret")
    with served.listening() as url:
        missing = ema("status", "--url", url)
        wrong = ema("status", "--url", url, "--token", "guess-me")
        right = ema("status", "--url", url, "--token", "s3cret")
    served.close()

    assert [missing.returncode, wrong.returncode, right.returncode] == [4, 4, 0]
    assert "guess-me" not in wrong.stderr


def test_healthcheck_exits_with_0_or_1(served: Served, url: str, tmp_path: Path) -> None:
    unready = ema("healthcheck", "--url", url, "--json")
    nowhere = ema("healthcheck", "--url", NOWHERE)
    served.beat()
    ready = ema("healthcheck", "--url", url)

    assert [unready.returncode, nowhere.returncode] == [1, 1]
    assert json.loads(unready.stdout)["checks"]["ingest"]["ok"] is False
    assert (ready.returncode, ready.stdout.splitlines()[0]) == (0, "ready")


@pytest.mark.process
def test_evaluate_imports_a_local_function_and_ends_with_the_run(served: Served, url: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVALUATION)
    served.publish("digits", 100, ["raw", "ema-0.9"])
    served.show("digits", 100, ["raw", "ema-0.9"], RunState.FINISHED)

    done = process("evaluate", "mine:evaluate", "--run", "digits", "--url", url, "--json", cwd=tmp_path)

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [(line["version"]["average"], line["metrics"]) for line in lines] == [
        ("raw", {"bias": 100.0}),
        ("ema-0.9", {"bias": 100.0}),
    ]
    assert len(served.metrics.reports("digits").result(WAIT_S)) == 2


@pytest.mark.process
def test_evaluate_exits_with_1_when_the_last_version_failed(served: Served, url: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVALUATION)
    served.publish("digits", 100, ["raw"])
    served.show("digits", 100, ["raw"], RunState.FINISHED)

    done = process("evaluate", "mine:fails", "--run", "digits", "--url", url, cwd=tmp_path)

    assert done.returncode == 1
    assert "FAILED: ValueError: no data" in done.stdout
    assert [row.error for row in served.metrics.reports("digits").result(WAIT_S)] == ["ValueError: no data"]


@pytest.mark.process
def test_interrupted_worker_exits_with_130(served: Served, url: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVALUATION)
    served.publish("digits", 100, ["raw"])
    command = [sys.executable, "-m", "ema_cli", "evaluate", "mine:evaluate", "--run", "digits", "--url", url]
    worker = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    first = worker.stdout.readline()
    time.sleep(0.1)
    worker.send_signal(signal.SIGINT)

    assert worker.wait(WAIT_S) == 130
    assert "bias=100" in first
    worker.stdout.close()


@pytest.mark.parametrize("target", ["a", "a/", "/b", "a/b/c", "a/b@", ""])
def test_incomplete_target_is_refused(target: str) -> None:
    with pytest.raises(UsageError):
        parse_target(target)


def test_target_names_run_average_and_revision() -> None:
    assert parse_target("a/b") == ("a", "b", "latest")
    assert parse_target("a/b@step-7") == ("a", "b", "step-7")


@pytest.mark.process
def test_reading_command_does_not_import_torch(tmp_path: Path) -> None:
    program = "import sys; from ema_cli.app import build; build(); print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"
