"""SIGKILL at random moments: no acknowledged generation is lost, and every generation is correct."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from support.processes import SUPPORT, Process, ServerProcess
from support.toy import check_version
from support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lane")]

KILLS = 20


def toy_trainer(server: ServerProcess, steps: int, checkpoint: Path, *options: str) -> Process:
    """A trainer of run `toy`."""
    script = str(SUPPORT / "toy_trainer.py")
    return Process(script, server.zmq, "toy", str(steps), str(checkpoint), *options)


def generations(data: Path) -> list[Path]:
    """Whole generations of run `toy`, oldest first."""
    return sorted((data / "runs" / "toy" / "generations").glob("[0-9]*"))


def check_generations(data: Path) -> int:
    """Hold every version of every generation against the oracle; returns the newest step."""
    newest = -1
    folders = generations(data)
    assert folders
    for folder in folders:
        about = json.loads((folder / "generation.json").read_text())
        versions = [check_version(version) for version in sorted((folder / "averages").iterdir())]
        assert {version["step"] for version in versions} == {about["step"]}
        newest = about["step"]
    return newest


@pytest.mark.timeout(300)
def test_server_killed_at_random_keeps_all_published_versions(tmp_path: Path) -> None:
    rng = random.Random(20)
    data = tmp_path / "data"
    server = ServerProcess(data, "--publish-every-seconds", "0.1")
    with toy_trainer(server, 100_000, tmp_path / "trainer.json", "0.002") as trainer:
        trainer.wait_line(lambda line: line.startswith("published"))
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.0, 0.8))
            with server:
                server.kill()
            acknowledged = published_steps(trainer)
            newest = json.loads((generations(data)[-1] / "generation.json").read_text())["step"]
            assert newest >= max(acknowledged)
            before = len(trainer.lines)
            server = ServerProcess(data, "--publish-every-seconds", "0.1", zmq=server.zmq, http=server.http_address)
            wait_for_more(trainer, before)
        assert trainer.popen.poll() is None, "the trainer never noticed more than skipped steps"
        assert not any("Traceback" in line for line in trainer.errors)
        trainer.kill()
    with server:
        assert server.get("/v1/runs/toy")["gap_steps"] > 0
        server.send(signal.SIGTERM)
        assert server.wait() == 0
    assert check_generations(data) >= max(published_steps(trainer))


@pytest.mark.timeout(300)
def test_trainer_killed_at_random_resumes_at_its_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(21)
    data, checkpoint = tmp_path / "data", tmp_path / "trainer.json"
    with ServerProcess(data, "--publish-every-seconds", "0.2") as server:
        for _ in range(KILLS):
            with toy_trainer(server, 100_000, checkpoint, "0.002") as trainer:
                trainer.wait_line(lambda line: line.startswith("published"))
                eventually(checkpoint.exists, "the trainer's first checkpoint")
                time.sleep(rng.uniform(0.0, 0.5))
                trainer.kill()
                assert not any("Traceback" in line for line in trainer.errors)
        resumed_at = json.loads(checkpoint.read_text())["step"]
        with toy_trainer(server, resumed_at + 60, checkpoint) as trainer:
            stats = json.loads(trainer.wait_line(lambda line: line.startswith("{")))
            assert trainer.wait() == 0
        assert stats["finished"]
        assert server.get("/v1/runs/toy")["state"] == "finished"
    assert check_generations(data) == stats["last_published_step"]


def published_steps(trainer: Process) -> list[int]:
    """Steps that were acknowledged to the trainer as published."""
    steps = [line.split()[1] for line in list(trainer.lines) if line.startswith("published")]
    return [int(step) for step in steps if step != "None"]


def wait_for_more(trainer: Process, before: int) -> None:
    """Wait until the trainer hears of another generation: it has reconnected by itself."""

    def heard() -> bool:
        assert trainer.popen.poll() is None, list(trainer.errors)[-20:]
        return len(trainer.lines) > before

    eventually(heard, "the trainer came back")
