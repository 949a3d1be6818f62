"""Which paths are checkpoints, of which step, and in which order."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ema_server.checkpoints.errors import ArgumentError, CheckpointError
from ema_server.checkpoints.folders import find, step_of
from support.checkpoints import save, save_run, save_sharded, weights


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("out/checkpoint-500", 500),
        ("out/step_500", 500),
        ("out/step-000500", 500),
        ("out/global_step500", 500),
        ("out/500", 500),
        ("out/iter_0000500", 500),
        ("out/epoch_3", 3),
        ("out/epoch=3-step=500", 500),
        ("out/my-lora-000004.safetensors", 4),
        ("out/my-lora-step00000500.safetensors", 500),
        ("out/checkpoint-500/model.safetensors", 500),
        ("out/checkpoint-500/unet", 500),
        ("out/checkpoint-500/unet/diffusion_pytorch_model.safetensors", 500),
        ("out/500/model.safetensors", 500),
        ("out/checkpoint-500/model.safetensors.index.json", 500),
        ("out/final", None),
        ("out/epoch=3-step=500.ckpt", 500),
        ("out/model_500.pt", 500),
        ("run-7/final", None),
        ("out/checkpoint-best", None),
        ("out/step_99999999999999999", None),
    ],
)
def test_step_is_read_from_the_name(path: str, step: int | None) -> None:
    assert step_of(Path(path)) == step


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    parent = save_run(tmp_path / "run", (500, 1000, 1500))

    found = find(sorted(parent.iterdir()))  # as a shell orders them: 1000 first

    assert [one.step for one in found] == [500, 1000, 1500]
    assert find([parent]) == found


def test_checkpoints_in_a_folder_are_preferred_to_its_own_model(tmp_path: Path) -> None:
    parent = save(save_run(tmp_path / "run", (500, 1000)), weights(1000))

    assert [one.step for one in find([parent])] == [500, 1000]


def test_other_folders_beside_checkpoints_are_ignored(tmp_path: Path) -> None:
    parent = save_run(tmp_path / "run", (500, 1000))
    for name in ("logs", "runs-7", "tmp-eval"):
        (parent / name).mkdir()

    assert [one.step for one in find([parent])] == [500, 1000]


def test_given_steps_replace_those_in_the_names(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", weights(1)), save(tmp_path / "two", weights(2))

    assert [(each.path, each.step) for each in find([two, one], [100, 200])] == [(two, 100), (one, 200)]


def test_checkpoints_without_steps_are_numbered_where_weights_are_given(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", weights(1)), save(tmp_path / "two", weights(2))

    assert [(each.path, each.step) for each in find([two, one], in_order=True)] == [(two, 1), (one, 2)]


def test_steps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parent = save_run(tmp_path / "run", (500, 1000))
    one, two = parent / "checkpoint-500", parent / "checkpoint-1000"
    other = save(tmp_path / "again" / "step_500", weights(1))
    nameless = save(tmp_path / "final", weights(1))

    for paths, steps, in_order, says in (
        ([one, two], [1], False, "--steps has 1 steps for 2 checkpoints"),
        ([one, two], [5, 3], False, "are of steps 5, 3: give them in the order of their steps"),
        ([two, one], None, True, "are of steps 1000, 500: give them in the order of their steps"),
        ([one, other], None, False, "are both of step 500"),
        ([one, two], [3, 3], False, "are both of step 3"),
        ([one, nameless], None, False, "final has no step in its name"),
        ([one], None, False, "holds no checkpoints with a step in their names"),
        ([one / "model.safetensors"], None, False, "is one checkpoint: give at least two"),
        ([tmp_path / "final"], None, False, "holds no checkpoints"),
    ):
        with pytest.raises(ArgumentError, match=says):
            find(paths, steps, in_order=in_order)


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin is a pickle.*convert each with python -c .*weights_only=True"),
        (["config.json"], "has no safetensors files"),
        (["a.safetensors", "b.safetensors"], r"has several safetensors files \(a.safetensors, b.safetensors\)"),
        (["model-00001-of-00002.safetensors"], "has parts of a checkpoint and no index of them"),
        (["unet/diffusion_pytorch_model.safetensors"], "its folders unet have: give one of them, as in .*unet"),
        (["global_step500/x"], "is a sharded checkpoint of DeepSpeed"),
        (["__0_0.distcp"], "is a sharded checkpoint of torch.distributed.checkpoint"),
    ],
)
def test_folder_without_usable_weights_says_what_to_do(tmp_path: Path, names: list[str], says: str) -> None:
    parent = save_run(tmp_path / "run", (500,))
    _make(parent / "checkpoint-1000", *names)

    with pytest.raises(CheckpointError, match=says):
        find([parent])


@pytest.mark.process
@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint-2.ckpt"])
def test_printed_command_converts_a_pickle(tmp_path: Path, name: str) -> None:
    tied = {**weights(2), "head.weight": weights(2)["linear.weight"].T}
    tied["tied.weight"] = tied["head.weight"]
    torch.save(tied if name.endswith(".bin") else {"state_dict": tied, "epoch": 3}, tmp_path / name)
    with pytest.raises(CheckpointError) as refusal:
        find([tmp_path / name, tmp_path / name], [1, 2])
    command = str(refusal.value).partition("convert each with ")[2].replace("python", sys.executable, 1)

    subprocess.run(shlex.split(command), check=True, timeout=60)

    converted = load_file((tmp_path / name).with_suffix(".safetensors"))
    assert set(converted) == set(tied)
    assert all(torch.equal(converted[key], tied[key]) for key in tied)


@pytest.mark.process
def test_printed_command_merges_the_parts_of_a_pickled_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for number, part in enumerate(({"a": torch.ones(2)}, {"b": torch.full((3,), step)}), 1):
            torch.save(part, folder / f"pytorch_model-0000{number}-of-00002.bin")
        (folder / "pytorch_model.bin.index.json").touch()
        with pytest.raises(CheckpointError) as refusal:
            find([tmp_path / "checkpoint-1", folder], [1, 2])
        command = str(refusal.value).partition("convert each checkpoint with ")[2]

        subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), check=True, timeout=60)

    found = find([tmp_path])
    assert [one.files for one in found] == [(one.path / "pytorch_model.safetensors",) for one in found]
    assert load_file(found[1].files[0])["b"].tolist() == [2, 2, 2]
    assert set(load_file(found[0].files[0])) == {"a", "b"}


def test_folder_without_checkpoints_says_where_they_are(tmp_path: Path) -> None:
    save_run(tmp_path / "project" / "checkpoints", (1, 2))
    _make(tmp_path / "lightning", "epoch=1-step=100.ckpt", "last.ckpt")
    _make(tmp_path / "nameless", "a.safetensors", "b.safetensors")

    with pytest.raises(ArgumentError, match=r"its folder checkpoints does: give .*project/checkpoints"):
        find([tmp_path / "project"])
    with pytest.raises(CheckpointError, match=r"epoch=1-step=100.ckpt is a pickle"):
        find([tmp_path / "lightning"])
    with pytest.raises(CheckpointError, match=r"last.ckpt is a pickle"):
        find([tmp_path / "lightning" / "last.ckpt"])
    with pytest.raises(ArgumentError, match=r"one by one, and their steps as in --steps 1000,2000"):
        find([tmp_path / "nameless"])


def test_path_that_is_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    one = save(tmp_path / "checkpoint-1", weights(1))
    sharded = save_sharded(tmp_path / "checkpoint-2", weights(2))
    _make(tmp_path, "3.ckpt", "4.gguf")

    for path, says in (
        (tmp_path / "none-5", "does not exist"),
        (tmp_path / "3.ckpt", "3.ckpt is a pickle"),
        (tmp_path / "4.gguf", "is not a safetensors file or a folder"),
        (next(sharded.glob("*.safetensors")), "is one part of a checkpoint: give its folder"),
    ):
        with pytest.raises(CheckpointError, match=says):
            find([one, path], [1, 2])


def test_index_can_be_given_itself(tmp_path: Path) -> None:
    folders = [save_sharded(tmp_path / f"checkpoint-{step}", weights(step)) for step in (1, 2)]

    found = find([folder / "model.safetensors.index.json" for folder in folders])

    assert [one.files for one in found] == [one.files for one in find(folders)]


def test_index_with_a_missing_file_is_an_incomplete_checkpoint(tmp_path: Path) -> None:
    parent = tmp_path / "run"
    for step in (1, 2):
        save_sharded(parent / f"checkpoint-{step}", weights(step))
    (parent / "checkpoint-2" / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(
        CheckpointError, match=r"names the file 'model-00002-of-00003.safetensors', which is not beside it"
    ):
        find([parent])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}'])
def test_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    for step in (1, 2):
        save_sharded(tmp_path / f"checkpoint-{step}", weights(step))
    (tmp_path / "checkpoint-2" / "model.safetensors.index.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        find([tmp_path])
