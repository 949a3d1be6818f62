"""Which uploaded buffers are accepted for a version, and what the new version holds."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role
from ema_server.derived.queue import DerivationQueue
from ema_server.derived.recalibration import BadBuffers, checked, recalibrate
from ema_server.derived.store import DerivedStore
from ema_server.storage.catalog import Version, VersionGone
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.safetensors_file import read_header
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average

_WEIGHTS: dict[str, Tensor] = {
    "w": torch.arange(6.0).reshape(2, 3),
    "frozen": torch.ones(2),
    "u": torch.ones(3),
    "mean": torch.tensor([1.0, 2.0]),
    "half": torch.tensor([1.0, 2.0]).bfloat16(),
    "seen": torch.tensor(7),
}
_ROLES = {"frozen": Role.FROZEN, "u": Role.STRUCTURAL, "mean": Role.BUFFER, "half": Role.BUFFER}
_NEW: dict[str, Tensor] = {"mean": torch.tensor([5.0, 6.0]), "seen": torch.tensor(9)}


def _manifest(aliases: dict[str, tuple[str, ...]] | None = None) -> Manifest:
    return manifest_of(_WEIGHTS, _ROLES, aliases)


def _checked(tmp_path: Path, buffers: dict[str, Tensor], manifest: Manifest | None = None) -> dict[str, bytes]:
    """What `checked` says of an upload for a file in which floats are wide, and every alias has its name."""
    shown = manifest or _manifest()
    wide = {
        name: _WEIGHTS[tensor.name].float() if tensor.is_float else _WEIGHTS[tensor.name]
        for tensor in shown.tensors
        for name in (tensor.name, *tensor.aliases)
    }
    save_file({name: value.clone() for name, value in wide.items()}, tmp_path / "model.safetensors")
    return checked(save(buffers), read_header(tmp_path / "model.safetensors"), shown)


def test_buffers_in_the_dtype_of_the_version_are_accepted(tmp_path: Path) -> None:
    found = _checked(tmp_path, {**_NEW, "half": torch.tensor([3.0, 4.0])})

    assert found["mean"] == torch.tensor([5.0, 6.0]).numpy().tobytes()
    assert found["half"] == torch.tensor([3.0, 4.0]).numpy().tobytes()
    assert found["seen"] == torch.tensor(9).numpy().tobytes()


@pytest.mark.parametrize(
    ("buffers", "text"),
    [
        ({}, "holds no tensor"),
        ({"nothing": torch.ones(2)}, "no tensor 'nothing'"),
        ({"w": torch.ones(2, 3)}, "'w' is a param .* only buffers"),
        ({"frozen": torch.ones(2)}, "'frozen' is a frozen .* only buffers"),
        ({"u": torch.ones(3)}, "'u' is a structural .* only buffers"),
        ({"mean": torch.ones(3)}, r"'mean' is torch.float32 \[3\], and torch.float32 \[2\] in the version"),
        ({"mean": torch.ones(2).double()}, "'mean' is torch.float64 .* torch.float32"),
        ({"half": torch.ones(2).bfloat16()}, "'half' is torch.bfloat16 .* torch.float32"),
        ({"seen": torch.tensor([9])}, r"'seen' is torch.int64 \[1\], and torch.int64 \[\]"),
        ({**_NEW, "mean": torch.tensor([1.0, float("nan")])}, "'mean' holds NaN or Inf"),
        ({**_NEW, "mean": torch.tensor([1.0, float("-inf")])}, "'mean' holds NaN or Inf"),
    ],
)
def test_buffers_that_do_not_fit_are_refused_by_name(tmp_path: Path, buffers: dict[str, Tensor], text: str) -> None:
    with pytest.raises(BadBuffers, match=text):
        _checked(tmp_path, buffers)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 100, save(_NEW)[:-1]])
def test_non_safetensors_upload_is_refused(data: bytes) -> None:
    with pytest.raises(BadBuffers, match="not a safetensors file"):
        checked(data, (), _manifest())


def test_tied_buffer_is_replaced_under_all_its_names(tmp_path: Path) -> None:
    manifest = _manifest({"mean": ("again.mean",)})
    one = _checked(tmp_path, {"again.mean": _NEW["mean"]}, manifest)
    both = _checked(tmp_path, {"mean": _NEW["mean"], "again.mean": _NEW["mean"].clone()}, manifest)

    assert one == both == dict.fromkeys(("mean", "again.mean"), _NEW["mean"].numpy().tobytes())
    with pytest.raises(BadBuffers, match="two values"):
        _checked(tmp_path, {"mean": _NEW["mean"], "again.mean": torch.zeros(2)}, manifest)


def _published(core: ServerCore) -> dict[str, Version]:
    joined(core.join("r", _manifest(), ["raw", "ema:0.9"], config='{"width": 3}'))
    core.apply("r", 1, _WEIGHTS)
    return dict(versions_by_average(core.publish("r")))


def _deriving(core: ServerCore) -> DerivationQueue:
    return DerivationQueue(DerivedStore(core.data_dir, core.catalog), core.ring, Event())


@pytest.mark.parametrize("average", ["raw", "ema-0.9"])
def test_new_version_differs_only_in_these_buffers(tmp_path: Path, average: str) -> None:
    with running_core(tmp_path) as core:
        base = _published(core)[average]
        deriving = _deriving(core)
        version, is_new = recalibrate(deriving, base, save(_NEW))
        again, is_again_new = recalibrate(deriving, base, save(_NEW))
        _, is_other_new = recalibrate(deriving, base, save({"seen": torch.tensor(1)}))
        before, after = (load_file(one.folder / "model.safetensors") for one in (base, version))

    assert (is_new, is_again_new, is_other_new) == (True, False, True)
    assert again == version
    assert (version.average, version.spec, version.step) == (f"{average}-bn", base.spec, base.step)
    assert (version.updates, version.gap_steps, version.derived) == (base.updates, base.gap_steps, "recalibrated")
    assert {file.name for file in version.files} == {file.name for file in base.files}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], {**before, **_NEW}[name]) for name in before)
    assert deriving.store.provenance(version) == {
        "kind": "recalibrated",
        "from": {"average": average, "step": 1, "id": base.id},
        "replaced": ["mean", "seen"],
    }


def test_damaged_version_is_not_copied(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        base = _published(core)["raw"]
        file = base.folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(BrokenGeneration, match="is damaged"):
            recalibrate(_deriving(core), base, save(_NEW))
        assert core.catalog.derived("r") == ()


def test_deleted_version_cannot_be_recalibrated(tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(_WEIGHTS)
    with running_core(tmp_path, keep_generations=1) as core:
        _published(core)
        core.apply("r", 2, weights)
        old = versions_by_average(core.publish("r"))["raw"]
        core.apply("r", 3, weights)
        durable(core.publish("r"))
        with pytest.raises(VersionGone):
            recalibrate(_deriving(core), old, save(_NEW))
