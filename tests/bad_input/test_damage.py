"""Generations damaged by a crash or a bad disk: a restart skips them, and no reader gets their bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ema_reader import Reader, VerificationFailed
from support.processes import ServerProcess
from support.toy import Toy, check_version, ledger_steps
from trainer_client import EmaClient

WAIT_S = 60.0
WEIGHTS = Path("averages", "ema-0.9", "model.safetensors")


@pytest.fixture
def generations(tmp_path: Path) -> list[Path]:
    """The folders of three generations, of steps 1 to 3, of a stopped server."""
    with ServerProcess(tmp_path / "data") as server:
        client = EmaClient(server.zmq, "r", ["raw", "ema:0.9"], when_behind="wait")
        for step in (1, 2, 3):
            client.update(Toy().at(step), step)
            assert client.flush(WAIT_S, durable=True)
        client.close()
        server.send(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
    return sorted((tmp_path / "data" / "runs" / "r" / "generations").iterdir())


def test_damaged_files_are_neither_resumed_nor_downloaded(tmp_path: Path, generations: list[Path]) -> None:
    """The newest has a flipped byte, the one before is truncated, and one folder is empty."""
    flipped = bytearray((generations[2] / WEIGHTS).read_bytes())
    flipped[-5] ^= 1
    (generations[2] / WEIGHTS).write_bytes(flipped)
    (generations[1] / WEIGHTS).write_bytes((generations[1] / WEIGHTS).read_bytes()[:-10])
    generations[0].with_name(f"{9:08d}-{9:012d}").mkdir()
    with ServerProcess(tmp_path / "data") as server, Reader(server.http) as reader:
        assert [version.step for version in reader.versions("r", "ema-0.9")] == [3, 1]
        with pytest.raises(VerificationFailed):
            reader.download(reader.version("r", "ema-0.9"), tmp_path / "flipped")
        command = [sys.executable, "-m", "ema_cli", "download", "r/ema-0.9", "-o", str(tmp_path / "flipped")]
        tried = subprocess.run(
            [*command, "--url", server.http], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert (tried.returncode, tried.stdout, len(tried.stderr.splitlines())) == (6, "", 1)
        assert list((tmp_path / "flipped").iterdir()) == []

        with EmaClient(server.zmq, "r", ["raw", "ema:0.9"], step=3, when_behind="wait") as client:
            client.update(Toy().at(4), 4)
        about = check_version(reader.download(reader.version("r", "ema-0.9"), tmp_path / "whole"))
        log = "\n".join(server.errors)

    assert list(ledger_steps(about["ledger"])) == [1, 4], "resumed from the one that is whole; what was lost is a gap"
    assert about["gap_steps"] == 2
    for folder in (generations[1].name, generations[2].name, f"{9:08d}-{9:012d}"):
        assert f"{folder} is broken and set aside" in log
        assert generations[0].with_name(f".bad-{folder}").is_dir(), "nothing is thrown away"
