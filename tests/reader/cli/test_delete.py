"""`ema delete`: what it says before, when it asks, and when it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from support.served import WAIT_S, Served
from support.waiting import eventually


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "data")
    served.start()
    served.publish("digits", 100, ["raw", "ema-0.9"])
    served.services.usage.measure("digits")
    yield served
    served.close()


def test_without_a_terminal_it_says_what_it_would_delete_and_refuses(served: Served, url: str) -> None:
    done = CliRunner().invoke(build(), ["delete", "digits", "--url", url])

    assert (done.exit_code, done.stdout) == (2, "")
    what, refusal = done.stderr.splitlines()
    assert what.startswith(f"digits (active) at {url}: 2 versions, ring and metrics, ")
    assert what.endswith(" kB on its disk")
    assert refusal == "ema: nothing is deleted: no terminal to ask at; give --yes to delete without a question"
    assert served.statuses.get("digits") is not None


def test_yes_deletes_without_a_question(served: Served, url: str) -> None:
    nbytes = served.services.usage.get("digits")

    done = CliRunner().invoke(build(), ["delete", "digits", "--yes", "--json", "--url", url])

    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"deleted": "digits", "versions": 2, "disk_bytes": nbytes}
    eventually(lambda: not list((served.data / "runs").iterdir()), "its files are erased", WAIT_S)
    again = CliRunner().invoke(build(), ["delete", "digits", "--yes", "--url", url])
    assert again.exit_code == 3
    assert "run 'digits' was deleted at" in again.stderr


@pytest.mark.process
@pytest.mark.parametrize(("answer", "code", "exists"), [("y", 0, False), ("n", 1, True), ("", 1, True)])
def test_on_a_terminal_it_asks(served: Served, url: str, answer: str, code: int, exists: bool) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ema_cli", "delete", "digits", "--url", url]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.write(ours, f"{answer}\n".encode())
        _, errors = process.communicate(timeout=3 * WAIT_S)
    os.close(ours)
    os.close(theirs)

    assert (process.returncode, "Delete it for good? [y/N]" in errors) == (code, True), errors
    assert ("ema: nothing is deleted" in errors) is exists
    assert (served.statuses.get("digits") is not None) is exists


def test_run_that_cannot_be_read_is_deleted(served: Served, url: str) -> None:
    (served.data / "runs" / "broken" / "generations" / ".bad-00000001-000000000001").mkdir(parents=True)
    shown = CliRunner().invoke(build(), ["status", "broken", "--url", url])
    done = CliRunner().invoke(build(), ["delete", "broken", "--yes", "--json", "--url", url])

    assert shown.exit_code == 3
    assert "no generation that can be read" in shown.stderr
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"deleted": "broken", "versions": 0, "disk_bytes": None}
    assert done.stderr.startswith(f"broken at {url}: files that cannot be read")
    eventually(lambda: not (served.data / "runs" / "broken").exists(), "its files are erased", WAIT_S)
