"""A server killed at any call to the disk loses nothing that it reported as durable, and leaves nothing partial."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ema_server.averager.jobs import Applied
from ema_server.storage.catalog import Version
from support.crashing import weights
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import ServerCore, joined, manifest_of, running_core, versions_by_average

pytestmark = pytest.mark.process

_REPORTS = ["step 2", "step 4", "rewound to 2", "finished at 7"]
_STEPS = [[], [1, 2], [1, 2, 3, 4], [1, 2], [1, 2, 7]]  # in the average after each of them


def _check(core: ServerCore, version: Version, steps: list[int]) -> None:
    ledger = json.loads((version.folder / "version.json").read_text())["ledger"]
    assert ledger_steps(ledger) == steps
    expected = replay(ledger, 0.9, weights)
    expected["w.tied"] = expected["w"]
    assert largest_difference(expected, core.load(version)) <= bound(ledger, 0.9, 1.0)


def _check_after_kill(data: Path, reported: list[str]) -> None:
    assert reported == _REPORTS[: len(reported)]
    with running_core(data) as core:
        generations = core.catalog.generations("r")
        found = generations[0].seq if generations else 0
        assert found >= len(reported), "what was reported as durable is there"
        folder = data / "runs" / "r" / "generations"
        left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        assert not [name for name in left if name.startswith(".")], "the sweep left nothing, and nothing was partial"
        manifest = manifest_of(weights(1), aliases={"w": ("w.tied",)})
        answer = joined(core.join("r", manifest, ["ema:0.9"], first_step=50, reconnect=True))
        assert answer.last_step == (_STEPS[found][-1] if found else None)
        for generation in generations:
            _check(core, generation.versions[0], _STEPS[generation.seq])
        assert isinstance(core.apply("r", 50, weights(50)), Applied)
        version = versions_by_average(core.publish("r"))["ema-0.9"]
        _check(core, version, [*_STEPS[found], 50])
        assert version.gap_steps == (50 - len(_STEPS[found]) - 1 if found else 0), "what was lost is a gap"


@pytest.mark.timeout(500)
def test_kill_at_any_disk_call_leaves_complete_generations(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "support.crashing", str(tmp_path)]
    tests = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    folders = sorted(tmp_path.iterdir())
    reports = [(folder / "reported").read_text().splitlines() for folder in folders]
    assert len(folders) == int(done.stdout) + 1 > 100, "every call was fatal once"
    assert reports[-1] == _REPORTS
    for folder, reported in zip(folders, reports, strict=True):
        _check_after_kill(folder / "data", reported)
