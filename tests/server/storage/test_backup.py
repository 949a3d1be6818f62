"""The commands of the page "Your data" make a backup of a server that runs, from which another one serves."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from ema_server.evaluation.metric_store import Report, Subject
from ema_server.storage.generation import read_record, verify
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (shutil.which("rsync") and shutil.which("sqlite3")), reason="needs rsync and sqlite3"),
]
_PAGE = Path(__file__).parents[3] / "docs" / "guides" / "data.md"
_AVERAGES = ("raw", "power:sigma_rel=0.05", "power:sigma_rel=0.1")
_VANISHED = 24  # of rsync: files were deleted during the copy


def _commands(heading: str) -> list[str]:
    """The commands of the block that follows a line of the page."""
    block = re.search(rf"^{re.escape(heading)}\n\n((?:    .+\n)+)", _PAGE.read_text(), flags=re.MULTILINE)
    assert block is not None, heading
    return [line.strip() for line in block[1].splitlines()]


def _run(command: str, folder: Path) -> None:
    for _ in range(50):
        done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != _VANISHED:
            break
    assert done.returncode == 0, done.stderr


def _publish(core: ServerCore, step: int) -> None:
    weights = {"w": torch.full((10_000,), float(step))}
    if step == 1:
        joined(core.join("r", manifest_of(weights), _AVERAGES))
    core.apply("r", step, weights)
    version = durable(core.publish("r")).versions[0]
    subject = Subject("r", version.average, version.id, step)
    report = Report(subject, "default", None, {"loss": 1.0 / step}, None, None, None, version.created)
    core.server.services.metrics.add(report).result(WAIT_S)


@pytest.mark.parametrize("heading", ["While the server runs:", "With the server stopped:"])
def test_documented_backup_can_be_served(tmp_path: Path, heading: str) -> None:
    is_running, over = heading.startswith("While"), threading.Event()

    def train(core: ServerCore) -> None:
        step = 4
        while not over.is_set():
            _publish(core, step)
            step += 1

    with running_core(tmp_path / "ema-data", keep_generations=1, ring_size=3) as core:
        for step in (1, 2, 3):
            _publish(core, step)
        trainer = threading.Thread(target=train, args=(core,))
        if is_running:
            trainer.start()
            for command in _commands(heading):
                _run(command, tmp_path)
            over.set()
            trainer.join(WAIT_S)
    if not is_running:
        for command in _commands(heading):
            _run(command, tmp_path)

    with running_core(tmp_path / "backup", keep_generations=1, ring_size=3) as core:
        generations = core.catalog.generations("r")
        assert generations[0].step >= 3
        for generation in generations:
            verify(generation.folder, read_record(generation.folder))
        assert len(core.server.services.metrics.reports("r").result(WAIT_S)) >= 3
        assert [snapshot.step for snapshot in core.ring.snapshots("r")]
    assert not list((tmp_path / "backup").glob("runs/*/*/.bad-*"))
