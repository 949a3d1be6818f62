"""What must hold of the data folder that a scenario of `crashing` left, after a kill or a power loss."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ema_server.averager.jobs import Applied
from ema_server.storage.catalog import Version
from ema_server.storage.generation import read_record, verify
from support.crashing import weights
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.server_core import WAIT_S, ServerCore, joined, manifest_of, running_core, versions_by_average
from support.waiting import eventually

REPORTS = ["step 2", "step 4", "rewound to 2", "finished at 7"]
_STEPS = [[], [1, 2], [1, 2, 3, 4], [1, 2], [1, 2, 7]]  # in the average after each of them


def _check(core: ServerCore, version: Version, steps: list[int]) -> None:
    ledger = json.loads((version.folder / "version.json").read_text())["ledger"]
    assert ledger_steps(ledger) == steps
    expected = replay(ledger, 0.9, weights)
    expected["w.tied"] = expected["w"]
    assert largest_difference(expected, core.load(version)) <= bound(ledger, 0.9, 1.0)


def check_publishing(data: Path, reported: list[str]) -> None:
    assert reported == REPORTS[: len(reported)]
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


def check_blending(data: Path, reported: list[tuple[str, ...]]) -> None:
    with running_core(data) as core:
        made = {version.average: version for version in core.catalog.derived("r")}
        made_ids = {name: version.id for name, version in made.items()}
        assert {(name, id) for name, id in reported[1:] if name.startswith("blend")} - made_ids.items() == (
            {reported[2]} if ("deleting", "blend-0.25") in reported and "blend-0.25" not in made else set()
        )
        assert ("deleted", "blend-0.25") not in reported or "blend-0.25" not in made
        kept = core.catalog.generations("r")
        for name, version in made.items():
            share = float(name.removeprefix("blend-"))
            raw, ema = (core.load(version) for version in kept[0].versions)
            exact = share * raw["d"].double() + (1 - share) * ema["d"].double()
            assert torch.equal(core.load(version)["d"], exact.float())
        folder = core.data_dir.derived_folder("r")
        left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        assert left == {version.folder.name for version in made.values()}, "nothing partial is left"


def check_deleting(data: Path) -> bool:
    """Whether the run is complete; otherwise there is nothing of it. The other run is always complete."""
    with running_core(data) as core:
        eventually(lambda: not core.data_dir.deleted(), "the deletion is completed", WAIT_S)
        runs = core.data_dir.runs()
        reports = {run: len(core.server.services.metrics.reports(run).result(WAIT_S)) for run in ("r", "other")}
        assert reports == {run: int(run in runs) for run in ("r", "other")}
        assert {path.name for path in (data / "runs").iterdir()} == set(runs)
        assert {status.run for status in core.statuses.all()} == set(runs)
        for run in runs:
            folder = core.catalog.generations(run)[0].folder
            verify(folder, read_record(folder))
            core.ring.settle(run)
            ring = core.ring.status(run)
            assert ring is not None
            assert ring.snapshots == 1
        assert "other" in runs
        return "r" in runs
