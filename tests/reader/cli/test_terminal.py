"""Tables as a terminal of 80 columns shows them: a real pseudo-terminal, a real server."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from ema_reader import Reader
from support.served import WAIT_S, Served

_METRICS = {
    "accuracy": 0.123456,
    "top5": 0.654321,
    "loss": 1.23456,
    "calibration_error": 0.0123456,
    "mse": 1.5,
    "ppl": 9,
}
_AVERAGES = ["raw", "ema-0.9999-of-the-classifier-head"]


def _in_terminal(*arguments: str) -> list[str]:
    """What a command writes to a terminal of 80 columns, in lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "ema_cli", *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # Linux: the other side is closed
            pass
        finally:
            os.close(ours)
        assert process.wait(WAIT_S) == 0, shown
    return shown.decode().splitlines()


@pytest.mark.process
@pytest.mark.parametrize("command", ["status", "status RUN", "versions", "metrics", "averages", "best"])
def test_tables_fit_and_no_value_is_cut(served: Served, reader: Reader, url: str, command: str) -> None:
    run = "resnet34-on-imagenet"
    served.publish(run, 100, _AVERAGES)
    for average in _AVERAGES:
        reader.report(reader.version(run, average), _METRICS)
    name, *with_run = command.split()
    arguments = [name, *([run] if with_run or name != "status" else [])]

    lines = _in_terminal(*arguments, *(["--by", "loss"] if name == "best" else []), "--url", url)

    assert max(map(len, lines)) <= 80
    assert "..." not in "\n".join(lines)
    if with_run or name in ("versions", "metrics", "best"):
        values = {f"{value:.6g}" for value in _METRICS.values()}
        assert values & set(" ".join(lines).replace("*", "").split())
