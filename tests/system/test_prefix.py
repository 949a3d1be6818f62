"""The commands that change a run, behind a real nginx that serves the server under a path prefix."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from support.command import ema
from support.processes import ServerProcess
from support.reverse_proxy import nginx
from trainer_client import EmaClient

_WAIT_S = 60.0
_STEPS = 64
_LOADER = """
import torch
from torch import nn

def batches():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), [torch.randn(8, 2) for _ in range(3)]
"""


def test_changing_commands_work_behind_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(_LOADER)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averages = ["power:sigma_rel=0.05", "power:sigma_rel=0.1"]
    options = ("--publish-every-seconds", "0", "--ring-every-steps", "2", "--ring-size", "64")
    with (
        ServerProcess(tmp_path / "data", *options) as server,
        nginx(server.http, tmp_path / "proxy") as behind,
        EmaClient(server.zmq, "r", averages, when_behind="wait") as client,
    ):
        for step in range(1, _STEPS + 1):
            with torch.no_grad():
                next(model.parameters()).normal_()
            client.update(model, step)
            if step % 2 == 0:
                assert client.flush(_WAIT_S, durable=True)

        def run(*arguments: str) -> None:
            done = ema(*arguments, "--url", behind, cwd=tmp_path)
            assert done.returncode == 0, (arguments, done.stderr)

        run("averages", "r", "--add", "swa")
        run("averages", "r", "--remove", "swa")
        run("synthesize", "r", "--sigma-rel", "0.07")
        run("recalibrate", "r/power-0.1", "--bn", "loader:batches")
        assert client.finish(_WAIT_S)
        run("delete", "r", "--yes")
