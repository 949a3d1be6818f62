"""A server of which one part dies ends at once with an exit code other than 0, and publishes what it still can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_server.storage.generation import is_folder_name, step_in
from support.processes import Process
from trainer_client import EmaClient

_END_S = 60.0
_PARTS = ("ingest", "averager", "publisher", "metrics", "derived versions", "evaluator", "HTTP")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("part", _PARTS)
def test_server_with_a_dead_part_ends_with_an_error(tmp_path: Path, part: str) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(3)")
    command = ("-m", "support.dying_server", part, "serve", "--data", str(tmp_path / "data"))
    options = ("--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--evaluate", "mine:evaluate")
    with Process(*command, *options, env={"DIE": str(tmp_path / "die")}) as server:
        ready = json.loads(server.wait_line(lambda line: line.startswith("{")))
        client = EmaClient(ready["zmq"], "r", averages=["raw"], when_behind="wait")
        model = nn.Linear(3, 2)
        client.update(model, 1)
        assert client.flush(_END_S, durable=True)
        with torch.no_grad():
            model.weight.fill_(2.0)
        client.update(model, 2)
        assert client.flush(_END_S)
        (tmp_path / "die").touch()
        code = server.wait(_END_S)
        client.close(timeout_s=1.0)
        errors = "\n".join(server.errors)

    assert code == 1, errors
    assert f"{part}: it has died (see above); the server stops" in errors
    generations = tmp_path.glob("data/runs/r/generations/*")
    step = max(step_in(folder.name) for folder in generations if is_folder_name(folder.name))
    assert step == (1 if part in ("averager", "publisher") else 2), "what can be published is"
