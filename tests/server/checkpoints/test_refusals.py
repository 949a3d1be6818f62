"""Checkpoints that do not match or are damaged are refused by name, and nothing is left of the output."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_server.checkpoints import average as averaging
from ema_server.checkpoints.errors import ArgumentError, CheckpointError
from support.checkpoints import Run, load, save, save_run, save_sharded, weights
from support.waiting import eventually


def _changed(step: int, **changes: Tensor | None) -> Mapping[str, Tensor]:
    """The weights with some tensors replaced, or left out if None; `__` stands for a dot."""
    new = weights(step) | {name.replace("__", "."): value for name, value in changes.items() if value is not None}
    return {name: value for name, value in new.items() if changes.get(name.replace(".", "__"), 0) is not None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"linear__weight": None}, "checkpoint-1 has no tensor 'linear.weight', which .*checkpoint-2 has"),
        ({"extra": torch.zeros(1)}, "checkpoint-1 has tensor 'extra', which .*checkpoint-2 does not have"),
        (
            {"linear__weight": torch.zeros(7, 300)},
            r"'linear.weight' is F32\[7, 300\] in .*checkpoint-1 and F32\[300, 7\] in",
        ),
        ({"half__weight": torch.zeros(11, 3)}, r"'half.weight' is F32\[11, 3\] in .*checkpoint-1 and BF16\[11, 3\] in"),
    ],
)
def test_first_tensor_that_differs_is_named(
    tmp_path: Path, run: Run, changes: dict[str, Tensor | None], says: str
) -> None:
    save(tmp_path / "run" / "checkpoint-1", _changed(1, **changes))
    save(tmp_path / "run" / "checkpoint-2", weights(2))

    with pytest.raises(CheckpointError, match=says):
        run(tmp_path / "run")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused_with_its_tensor_and_file(tmp_path: Path, run: Run, value: float) -> None:
    parent = save_run(tmp_path / "run", (1, 3))
    linear = torch.zeros(300, 7)
    linear[299, 6] = value
    save(parent / "checkpoint-2", _changed(2, linear__weight=linear))

    with pytest.raises(CheckpointError, match=r"'linear.weight' of .*checkpoint-2/model.safetensors has NaN or Inf"):
        run(parent)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no temporary folder either

    (made,) = run(parent, rules="swa:exclude=linear.*,name=x")
    assert torch.equal(load(made.folder)["linear.weight"], weights(3)["linear.weight"])


def test_damaged_file_is_refused(tmp_path: Path, run: Run) -> None:
    parent = save_run(tmp_path / "run", (1, 2))
    file = parent / "checkpoint-1" / "model.safetensors"
    whole = file.read_bytes()
    fp8 = whole.replace(b'"dtype":"BF16"', b'"dtype":"F8_X"')

    for content, says in (
        (whole[:-5], "ends at byte .*, within tensor .*: it was not written completely"),
        (whole[:20], "is not a safetensors file"),
        (b"", "is not a safetensors file"),
        (fp8, "tensor 'half.weight' has dtype F8_X; known are F64"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            run(parent)


def test_index_that_disagrees_with_its_files_is_refused(tmp_path: Path, run: Run) -> None:
    for step in (1, 2):
        save_sharded(tmp_path / "run" / f"checkpoint-{step}", weights(step))
    path = tmp_path / "run" / "checkpoint-1" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    some = index["weight_map"]

    for changed, says in (
        (
            {**some, "more": "model-00001-of-00003.safetensors"},
            "tensor 'more' is in model-00001.*, which does not have it",
        ),
        (
            {name: some[name] for name in some if name != "scale"},
            "has tensor 'scale', which model.safetensors.index.json",
        ),
    ):
        path.write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(CheckpointError, match=says):
            run(tmp_path / "run")


def test_tensor_in_two_files_is_refused(tmp_path: Path, run: Run) -> None:
    for step in (1, 2):
        save_sharded(tmp_path / "run" / f"checkpoint-{step}", weights(step), shards=2)
    save(tmp_path / "run" / "checkpoint-1", weights(1), name="model-00002-of-00002")

    with pytest.raises(
        CheckpointError, match=r"is in .*model-00001-of-00002.safetensors and in .*model-00002-of-00002"
    ):
        run(tmp_path / "run")


def test_pattern_that_matches_nothing_is_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ArgumentError, match=r"'head.*' of exclude= .*matches no tensor"):
        run(save_run(tmp_path / "run", (1, 2)), rules="swa:exclude=head.*,name=x")


def test_output_is_replaced_only_by_force(tmp_path: Path, run: Run) -> None:
    parent = save_run(tmp_path / "run", (1, 2, 3))
    run(parent, rules="window:2")
    before = load(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").touch()

    with pytest.raises(ArgumentError, match=r"out exists: choose another output, or replace it with --force"):
        run(parent, rules="window:3")
    assert torch.equal(load(tmp_path / "out")["scale"], before["scale"])

    run(parent, rules="window:3", force=True)
    assert not torch.equal(load(tmp_path / "out")["scale"], before["scale"])
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_failed_replacement_leaves_the_old_output(tmp_path: Path, run: Run) -> None:
    run(save_run(tmp_path / "run", (1, 2)))
    save(tmp_path / "run" / "checkpoint-3", _changed(3, scale=torch.tensor(math.nan)))

    with pytest.raises(CheckpointError, match=r"NaN"):
        run(tmp_path / "run", force=True)

    assert load(tmp_path / "out")["scale"].item() == 1.5
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_empty_folder_is_no_obstacle(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()

    run(save_run(tmp_path / "run", (1, 2)))

    assert (tmp_path / "out" / "version.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_output_that_would_destroy_a_checkpoint_is_refused(tmp_path: Path, run: Run, *, force: bool) -> None:
    parent = save_run(tmp_path / "run", (1, 2))
    files = sorted(parent.rglob("*"))

    for output in (parent, parent / "checkpoint-1", parent / "checkpoint-1" / "average", tmp_path):
        with pytest.raises(ArgumentError, match=r"is, holds or is part of the checkpoint"):
            run(parent, output=output, force=force)
    file = parent / "checkpoint-1" / "model.safetensors"
    with pytest.raises(ArgumentError, match=r"is not a folder|is part of"):
        run(parent, output=file, force=force)
    assert sorted(parent.rglob("*")) == files


def test_too_small_a_disk_is_refused_before_anything_is_read(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "shortage", lambda folder, needed: f"0 are free, {needed} are needed")

    with pytest.raises(CheckpointError, match=r"the averages do not fit: 0 are free"):
        run(save_run(tmp_path / "run", (1, 2)))

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.process
def test_interrupt_leaves_no_output(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run" / f"checkpoint-{step}", {"w": torch.zeros(30_000_000)})
    command = [
        sys.executable,
        "-m",
        "ema_cli",
        "average",
        str(tmp_path / "run"),
        "--rule",
        "swa",
        "-o",
        str(tmp_path / "out"),
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        eventually(lambda: any(tmp_path.glob(".out.tmp-*")), "the temporary folder", 30.0, every_s=0.001)
        time.sleep(0.01)
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(30.0) in (130, 0)
    finally:
        child.kill()
        child.communicate()

    assert not any(tmp_path.glob(".out.tmp-*"))
    if child.returncode == 130:
        assert not (tmp_path / "out").exists()
