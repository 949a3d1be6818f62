"""The disk space of a run is what `du` says, after everything that changes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from ema_proto.averages.rules import PowerEma
from ema_proto.averages.specs import parse_average
from ema_server.storage.usage import allocated_bytes
from support.server_core import WAIT_S, ServerCore, durable, joined, manifest_of, running_core
from support.waiting import eventually

pytestmark = pytest.mark.process

_AVERAGES = ("raw", "power:sigma_rel=0.05", "power:sigma_rel=0.1")


def _du(folder: Path) -> int:
    done = subprocess.run(["du", "--summarize", "--block-size=1", folder], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(1 << 20))
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "one", tmp_path / "folder" / "two")
    (tmp_path / "link").symlink_to("one")

    assert 1 << 20 <= allocated_bytes(tmp_path) < 2 << 20
    assert allocated_bytes(tmp_path) == _du(tmp_path)


def test_disk_space_is_measured_after_publishing_pruning_deriving_and_deleting(tmp_path: Path) -> None:
    weights = {"w": torch.ones(50_000)}
    with running_core(tmp_path, keep_generations=1, ring_size=3) as core:
        joined(core.join("r", manifest_of(weights), _AVERAGES))
        sizes = []
        for step in (1, 2, 3, 4):
            core.apply("r", step, weights)
            durable(core.publish("r", "checkpoint"))
            sizes.append(_measured(core))
        assert sizes == sorted(sizes)

        rule = parse_average("power:sigma_rel=0.07,name=made")
        assert isinstance(rule, PowerEma)
        made = core.server.services.deriving.synthesize("r", rule, 4)
        derived = _measured(core)
        assert derived >= sizes[-1] + 4 * 50_000
        assert core.server.services.deriving.store.delete(made.version)
        assert _measured(core) < derived

        durable(core.finish("r"))
        finished = _measured(core)
    with running_core(tmp_path, keep_generations=1, ring_size=3) as core:
        assert _measured(core) <= finished, "measured at the start"
        core.delete("r")
        eventually(lambda: core.server.services.usage.get("r") is None, "a deleted run takes no space", WAIT_S)


def _measured(core: ServerCore) -> int:
    """What the server says, as soon as it is what `du` says."""
    folder = core.data_dir.run_folder("r")

    def agreed() -> int | None:
        shown = core.server.services.usage.get("r")
        return shown if shown == _du(folder) else None

    return eventually(agreed, "the measured size is that of du", WAIT_S)
