"""Averages of checkpoints: the tensors, and the files in which they are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ema_proto.averages.specs import split_averages
from ema_proto.wire.manifest import Role
from ema_server.checkpoints import combine as combining
from ema_server.checkpoints.plan import role_of
from support.checkpoints import Run, load, save, save_run, save_sharded, summed, weights
from support.oracle import EPS32, largest_difference
from support.server_core import durable, joined, manifest_of, running_core

_STEPS = (3, 4, 8, 9, 12)
_RULES = (
    "window:3,ema:0.8,ema:0.9,acc=float64,name=wide,power:sigma_rel=0.1,swa,swa:every=4,wsd:start=3,steps=6,"
    "ema:0.9,warmup=timm,buffers=copy,name=timm,ema:0.7,exclude=linear.*,name=without,raw"
)
_ON_A_SERVER = (
    "ema:0.8,ema:0.9,acc=float64,name=wide,ema:0.99,warmup=half_life,name=half,ema:0.9,warmup=timm,buffers=copy,name=timm,"
    "power:sigma_rel=0.1,swa:every=4,swa:start=4,every=2,window:2,every=4,wsd:start=3,steps=6,shape=cosine,"
    "ema:0.7,exclude=linear.*,name=without,raw"
)


def _bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {
        name: value.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
        if len(value.reshape(-1))
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("rule", split_averages(_RULES))
def test_average_is_the_float64_sum_of_the_checkpoints(tmp_path: Path, run: Run, rule: str) -> None:
    (made,) = run(save_run(tmp_path / "run", _STEPS), rules=rule)

    found, newest = load(made.folder), weights(made.version["step"])
    expected = summed([weights(step) for step in _STEPS], made.weighing.shares)
    copied = ["sn.weight_u", *(name for name, value in newest.items() if not value.is_floating_point())]
    copied += ["bn.running_mean", "bn.running_var"] if "buffers=copy" in rule else []
    copied += ["linear.weight"] if "exclude" in rule else []
    expected |= {name: newest[name] for name in copied}
    assert largest_difference(found, expected) <= 12 * 16 * EPS32  # weights up to 12, at most 16 roundings
    floats = {value.dtype for value in found.values() if value.is_floating_point()}
    assert floats == ({torch.float32, torch.bfloat16, torch.float64} if rule == "raw" else {torch.float32})


def test_average_equals_that_of_a_server_that_received_the_checkpoints(tmp_path: Path, run: Run) -> None:
    roles = {"bn.running_mean": Role.BUFFER, "bn.running_var": Role.BUFFER, "sn.weight_u": Role.STRUCTURAL}
    with running_core(tmp_path / "data") as core:
        joined(core.join("r", manifest_of(weights(1), roles=roles), split_averages(_ON_A_SERVER)))
        for step in _STEPS:
            core.apply("r", step, weights(step))
        online = {version.average: core.load(version) for version in durable(core.publish("r")).versions}

    averages = run(save_run(tmp_path / "run", _STEPS), rules=_ON_A_SERVER)

    assert [made.weighing.name for made in averages] == list(online)
    for made in averages:
        assert _bits(load(made.folder)) == _bits(online[made.weighing.name]), made.weighing.name


def test_average_of_every_step_equals_that_of_a_server(tmp_path: Path, run: Run) -> None:
    steps = range(1, 13)
    with running_core(tmp_path / "data") as core:
        joined(core.join("r", manifest_of(weights(1), roles={"sn.weight_u": Role.STRUCTURAL}), ["window:5", "swa"]))
        for step in steps:
            core.apply("r", step, weights(step))
        online = {version.average: core.load(version) for version in durable(core.publish("r")).versions}

    for made in run(save_run(tmp_path / "run", steps), rules="window:5,swa"):
        assert _bits(load(made.folder)) == _bits(online[made.weighing.name])


def test_sharded_and_single_checkpoints_give_the_same_bytes(tmp_path: Path, run: Run) -> None:
    for step in _STEPS:
        save_sharded(tmp_path / "sharded" / f"checkpoint-{step}", weights(step), shards=1 + step % 3)
    save_sharded(tmp_path / "sharded" / "checkpoint-12", weights(12), shards=4)

    (single,) = run(save_run(tmp_path / "run", _STEPS), output=tmp_path / "single")
    (sharded,) = run(tmp_path / "sharded", output=tmp_path / "other")

    index = json.loads((sharded.folder / "model.safetensors.index.json").read_text())
    assert len(list(sharded.folder.glob("*.safetensors"))) == 4
    assert largest_difference(load(single.folder), load(sharded.folder)) == 0.0
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load(sharded.folder).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(sharded.folder / file)


def test_blocks_do_not_change_the_result(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save_run(tmp_path / "run", _STEPS)
    (whole,) = run(checkpoints, output=tmp_path / "whole")
    monkeypatch.setattr(combining, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(combining, "_READERS", 2)

    (blocks,) = run(checkpoints, output=tmp_path / "blocks")

    assert _sha256(whole.folder / "model.safetensors") == _sha256(blocks.folder / "model.safetensors")


def test_tensors_in_another_order_are_found(tmp_path: Path, run: Run) -> None:
    save(tmp_path / "run" / "checkpoint-1", {"b": torch.ones(9), "a": torch.ones(5)})
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [5], "data_offsets": [36, 56]},
            "b": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]},
        }
    )
    other = tmp_path / "run" / "checkpoint-2"
    other.mkdir()
    content = torch.cat([torch.full((9,), 3.0), torch.full((5,), 5.0)])
    (other / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + content.numpy().tobytes()
    )

    (made,) = run(tmp_path / "run", rules="swa")

    assert load(made.folder)["a"].tolist() == [3.0] * 5
    assert load(made.folder)["b"].tolist() == [2.0] * 9
    for one in made.version["derived"]["checkpoints"]:
        assert one["files"][0]["sha256"] == _sha256(Path(one["path"]) / "model.safetensors")


def test_dtypes_of_the_checkpoints_are_kept_with_one_rounding(tmp_path: Path, run: Run) -> None:
    checkpoints = save_run(tmp_path / "run", _STEPS)
    (wide,) = run(checkpoints, output=tmp_path / "wide")

    (narrow,) = run(checkpoints, output=tmp_path / "narrow", keep_dtype=True)

    found, exact = load(narrow.folder), load(wide.folder)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in weights(1).items()
    }
    assert torch.equal(found["half.weight"], exact["half.weight"].bfloat16())
    assert torch.equal(found["double.weight"].float(), exact["double.weight"])


def test_version_has_the_share_and_the_digests_of_each_checkpoint(tmp_path: Path, run: Run) -> None:
    for step in _STEPS:
        save_sharded(tmp_path / "run" / f"checkpoint-{step}", weights(step))

    (made,) = run(tmp_path / "run", rules="window:2")

    version = json.loads((made.folder / "version.json").read_text())
    assert version == made.version
    assert (version["average"], version["spec"], version["step"], version["updates"]) == ("window-2", "window:2", 12, 2)
    assert [(each["step"], each["share"]) for each in version["derived"]["checkpoints"]] == [(9, 0.5), (12, 0.5)]
    for each in version["derived"]["checkpoints"]:
        folder = Path(each["path"])
        assert {file["name"]: file["sha256"] for file in each["files"]} == {
            path.name: _sha256(path) for path in folder.glob("*.safetensors")
        }
    for file in version["files"]:
        assert (file["size"], file["sha256"]) == (
            (made.folder / file["name"]).stat().st_size,
            _sha256(made.folder / file["name"]),
        )


def test_checkpoints_without_a_share_are_not_read(tmp_path: Path, run: Run) -> None:
    save_run(tmp_path / "run", _STEPS)
    (tmp_path / "run" / "checkpoint-3" / "model.safetensors").write_bytes(b"broken")

    (made,) = run(tmp_path / "run", rules="window:2")

    assert made.version["updates"] == 2


def test_metadata_of_the_newest_file_is_kept(tmp_path: Path, run: Run) -> None:
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / str(step) / "model.safetensors", metadata={"note": str(step)})

    (made,) = run(tmp_path / "1", tmp_path / "2", rules="swa")

    with safe_open(made.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "2"}


def test_companion_files_of_the_newest_checkpoint_are_copied(tmp_path: Path, run: Run) -> None:
    newest = save_run(tmp_path / "run", (1, 2)) / "checkpoint-2"
    kept = (
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "templates/tool.jinja",
        "LICENSE",
    )
    left = (
        "trainer_state.json",
        "optimizer.pt",
        "training_args.bin",
        "rng_state.pth",
        "checkpoint-1/config.json",
        ".hidden.json",
    )
    for name in (*kept, *left):
        (newest / name).parent.mkdir(exist_ok=True)
        (newest / name).write_text(name)

    (made,) = run(tmp_path / "run")

    written = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert written == {*kept, "model.safetensors", "version.json"}
    assert all((made.folder / name).read_text() == name for name in kept)


@pytest.mark.parametrize("name", ["adapter_model", "diffusion_pytorch_model", "model"])
def test_file_keeps_the_name_that_loaders_look_for(tmp_path: Path, run: Run, name: str) -> None:
    for step in (1, 2):
        save(tmp_path / "run" / f"step_{step}", weights(step), name=name)

    (made,) = run(tmp_path / "run")

    assert [path.name for path in made.folder.glob("*.safetensors")] == [f"{name}.safetensors"]


def test_files_of_one_folder_are_checkpoints(tmp_path: Path, run: Run) -> None:
    for step in (1, 2):
        save(tmp_path / "loras", weights(step), name=f"mine-step{step:08d}")
    (tmp_path / "loras" / "notes.json").write_text("{}")

    (made,) = run(tmp_path / "loras")

    assert sorted(path.name for path in made.folder.iterdir()) == ["model.safetensors", "version.json"]
    assert made.version["updates"] == 2


def test_several_averages_have_a_folder_each(tmp_path: Path, run: Run) -> None:
    made = run(save_run(tmp_path / "run", _STEPS), rules="window:2,swa")

    assert [each.folder for each in made] == [tmp_path / "out" / "window-2", tmp_path / "out" / "swa"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["swa", "window-2"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layer1.0.bn1.running_mean", Role.BUFFER),
        ("running_var", Role.BUFFER),
        ("a.weight_u", Role.STRUCTURAL),
        ("a.weight_mask", Role.STRUCTURAL),
        ("b.parametrizations.weight.0._u", Role.STRUCTURAL),
        ("c.weight_u", Role.PARAM),
        ("d._u", Role.PARAM),
        ("a.weight_orig", Role.PARAM),
    ],
)
def test_roles_follow_from_names_that_torch_uses(name: str, role: Role) -> None:
    assert role_of(name, {"a.weight_orig", name}) is role
