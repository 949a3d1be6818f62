"""Interruptions: of a download by a full disk, of a waiting trainer by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.processes import Process, ServerProcess
from support.served import Served, weights

WAIT_S = 60.0
_TRAINER = """
import pathlib, sys, time, torch
from trainer_client import EmaClient

model = torch.nn.Linear(2, 2)
client = EmaClient(sys.argv[1], "r", ["raw"])
client.update(model, 1)
assert client.flush()
print("ready", flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.01)
client.update(model, 2)
print("waiting", flush=True)
{waits}
"""


def download(url: str, to: Path, *, largest_kib: int | None = None) -> subprocess.CompletedProcess[str]:
    limit = "" if largest_kib is None else f"ulimit -f {largest_kib * 2 if _DASH else largest_kib}; "
    command = [sys.executable, "-m", "ema_cli", "download", "r/raw", "-o", str(to), "--url", url]
    return subprocess.run(
        ["sh", "-c", limit + 'exec "$@"', "sh", *command], capture_output=True, text=True, timeout=WAIT_S, check=False
    )


# The unit of `ulimit -f` is 512 bytes in POSIX shells and 1 KiB in bash.
_DASH = "bash" not in str(Path("/bin/sh").resolve())


def test_download_on_a_full_disk_is_one_line_and_resumes(tmp_path: Path) -> None:
    served = Served(tmp_path / "data")
    try:
        served.publish("r", 1, ["raw"], size=60_000)
        with served.listening() as url:
            stopped = download(url, tmp_path / "out", largest_kib=512)
            (part,) = (tmp_path / "out").iterdir()
            kept = part.read_bytes()
            finished = download(url, tmp_path / "out")
    finally:
        served.close()

    assert (stopped.returncode, stopped.stdout, len(stopped.stderr.splitlines())) == (1, "", 1), stopped.stderr
    assert "File too large" in stopped.stderr
    assert part.name.endswith(".partial")
    assert 0 < len(kept) <= 512 << 10
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes().startswith(kept)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), weights("raw", 1, 60_000)
    assert all((found[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("waits", ["client.flush(600)", "client.checkpoint(2, 600)", "client.finish(600)"])
def test_ctrl_c_reaches_a_trainer_that_waits_for_a_silent_server(tmp_path: Path, waits: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(_TRAINER.format(waits=waits))
    go = tmp_path / "go"
    with ServerProcess(tmp_path / "data") as server, Process(str(script), server.zmq, str(go)) as trainer:
        trainer.wait_line(lambda line: line == "ready")
        server.send(signal.SIGSTOP)
        go.touch()
        trainer.wait_line(lambda line: line == "waiting")
        trainer.send(signal.SIGINT)
        code = trainer.wait(WAIT_S)

    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in trainer.errors
