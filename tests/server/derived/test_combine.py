"""A synthesized file is the float64 sum of the stored ones; copied tensors are the newest; all bytes are verified."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ema_proto.averages.rules import PowerEma
from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Applied, Rewound
from ema_server.derived import combine as combining
from ema_server.derived.plan import CannotSynthesize
from ema_server.derived.queue import Stopped
from ema_server.storage.catalog import Version
from ema_server.storage.records import BrokenGeneration
from support.afterwards import Afterwards, afterwards
from support.oracle import EPS32
from support.server_core import durable, joined, manifest_of

_RULE = PowerEma(0.08)
_POWERS = ("power:sigma_rel=0.05", "power:sigma_rel=0.1", "raw")


def _weights(step: int) -> dict[str, Tensor]:
    """Weights of every kind; `mask` is not finite from the first snapshot on, so it is copied."""
    generator = torch.Generator().manual_seed(step)
    return {
        "d": torch.rand(7, generator=generator, dtype=torch.float64) - 0.5,
        "w": torch.rand(300, 3, generator=generator) - 0.5,
        "mask": torch.tensor([0.0, -math.inf, float(step)]),
        "half": (torch.rand(11, generator=generator) - 0.5).bfloat16(),
        "n": torch.tensor(step),
        "flag": torch.tensor([step % 2 == 0]),
        "none": torch.zeros(0),
        "one": torch.tensor(float(step)),
    }


_MANIFEST = manifest_of(_weights(1), roles={"mask": Role.BUFFER}, aliases={"w": ("w.tied", "w.again")})


def _fill(both: Afterwards, steps: int = 8, first: int = 1, offset: int = 0) -> None:
    for step in range(first, steps + 1):
        assert isinstance(both.core.apply("r", step, _weights(step + offset)), Applied)
        durable(both.core.publish("r"))


@pytest.fixture
def dtype() -> str:
    """The ring's; tests say so where it is another."""
    return "float32"


@pytest.fixture
def both(tmp_path: Path, dtype: str) -> Iterator[Afterwards]:
    """A run of eight generations."""
    with afterwards(tmp_path, ring_dtype=dtype) as both:
        joined(both.core.join("r", _MANIFEST, _POWERS, config='{"width": 3}'))
        _fill(both)
        yield both


def _record(version: Version) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((version.folder / "version.json").read_text())
    return found


def _stored(both: Afterwards, average: str, step: int) -> dict[str, Tensor]:
    folder = next(one.folder for one in both.core.ring.snapshots("r") if one.step == step)
    return load_file(folder / f"{average}.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_synthesized_average_is_the_sum_of_stored_ones_rounded_once(
    both: Afterwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combining, "_CHUNK_ELEMENTS", 128)
    version = both.deriving.synthesize("r", _RULE, None).version
    made = load_file(version.folder / "model.safetensors")
    inputs = _record(version)["derived"]["inputs"]
    parts = [(part["share"], _stored(both, part["average"], part["step"])) for part in inputs]

    assert len(parts) > 8
    for name in ("d", "w", "half", "one"):
        terms = [share * part[name].double() for share, part in parts]
        exact, size = sum(terms, start=torch.tensor(0.0)), sum((term.abs() for term in terms), start=torch.tensor(0.0))
        assert ((made[name].double() - exact).abs() <= EPS32 * exact.abs() + 1e-14 * size).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copied_tensors_come_from_the_newest_snapshot(both: Afterwards) -> None:
    version = both.deriving.synthesize("r", _RULE, 6).version
    made = load_file(version.folder / "model.safetensors")

    newest = _weights(6)
    for name in ("mask", "n", "flag"):
        assert torch.equal(made[name], newest[name]), name
    for name in ("w.tied", "w.again"):
        assert torch.equal(made[name], made["w"])
    published = load_file(both.core.catalog.versions("r", "power-0.05")[0].folder / "model.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in made.items()} == {
        name: (value.dtype, value.shape) for name, value in published.items()
    }


def test_batch_norm_variance_is_never_negative_with_mixed_shares(tmp_path: Path) -> None:
    """A channel that died in mid-run; `w` has the same values, so that the sum is seen to go below zero."""

    def dying(step: int) -> dict[str, Tensor]:
        value = torch.full((4,), 1.0 if step <= 5 else 0.0)
        return {"norm.running_var": value, "w": value.clone()}

    with afterwards(tmp_path) as both:
        manifest = manifest_of(dying(1), roles={"norm.running_var": Role.BUFFER})
        joined(both.core.join("r", manifest, _POWERS))
        for step in range(1, 31):
            assert isinstance(both.core.apply("r", step, dying(step)), Applied)
            durable(both.core.publish("r"))
        version = both.deriving.synthesize("r", PowerEma(0.04), None).version
        least = min(_stored(both, name, 30)["norm.running_var"].min().item() for name in ("power-0.05", "power-0.1"))
    made = load_file(version.folder / "model.safetensors")

    assert (made["w"] < 0).all()
    assert (made["norm.running_var"] == least).all()
    assert least > 0


def test_version_json_lists_the_sources(both: Afterwards) -> None:
    version = both.deriving.synthesize("r", _RULE, 7).version
    record = _record(version)

    assert (version.average, version.spec, version.step, version.updates) == (
        "power-0.08",
        "power:sigma_rel=0.08",
        7,
        7,
    )
    assert (version.folder / "config.json").read_text() == '{"width": 3}'
    derived = record["derived"]
    assert (derived["kind"], derived["sigma_rel"], derived["origin"]) == ("synthesized", 0.08, 0)
    assert math.fsum(part["share"] for part in derived["inputs"]) == pytest.approx(1.0)
    known = {item.id for name in ("power-0.05", "power-0.1") for item in both.core.catalog.versions("r", name)}
    kept = {member.version for one in both.core.ring.snapshots("r") for member in one.members}
    assert {part["id"] for part in derived["inputs"]} <= known | kept
    assert derived["buffers_from"]["step"] == 7


def test_synthesized_average_inherits_buffers_include_and_exclude(tmp_path: Path) -> None:
    with afterwards(tmp_path) as both:
        rules = [f"power:sigma_rel={width},buffers=copy,exclude=w" for width in ("0.05", "0.1")]
        joined(both.core.join("r", _MANIFEST, rules))
        _fill(both)
        version = both.deriving.synthesize("r", _RULE, None).version
        assert version.spec == "power:sigma_rel=0.08,buffers=copy,exclude=w"
        assert version.average == "power-0.08"
        assert torch.equal(load_file(version.folder / "model.safetensors")["w"], _weights(8)["w"])
        assert not both.deriving.synthesize("r", _RULE, None).is_new


def test_same_request_gives_the_same_version(both: Afterwards) -> None:
    first = both.deriving.synthesize("r", _RULE, None)
    again = both.deriving.synthesize("r", _RULE, 8)

    assert (first.is_new, again.is_new) == (True, False)
    assert (again.version, again.facts) == (first.version, first.facts)
    assert both.deriving.synthesize("r", _RULE, 7).version != first.version


def test_same_step_after_a_rewind_gives_another_version(both: Afterwards) -> None:
    both.deriving.synthesize("r", _RULE, 5)
    late = both.deriving.synthesize("r", _RULE, 8).version
    assert isinstance(both.core.rewind("r", 7), Rewound)
    _fill(both, 8, first=8, offset=100)
    again = both.deriving.synthesize("r", _RULE, 8)

    assert again.is_new
    assert again.version.id != late.id
    assert both.core.catalog.find("r", "power-0.08", "step-8") == again.version
    assert both.core.catalog.find("r", "power-0.08", late.id) == late, "what was made stays"
    assert not both.deriving.synthesize("r", _RULE, 5).is_new, "step 5 is of both histories"


def test_flipped_byte_in_the_ring_is_found_and_nothing_is_written(both: Afterwards) -> None:
    snapshot = both.core.ring.snapshots("r")[-2]
    path = snapshot.folder / "power-0.1.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.unlink()
    path.write_bytes(data)

    with pytest.raises(BrokenGeneration, match=r"power-0.1.safetensors has sha256 .* instead of"):
        both.deriving.synthesize("r", _RULE, None)
    assert both.core.catalog.derived("r") == ()
    assert list(both.core.data_dir.derived_folder("r").iterdir()) == []


def test_stopping_server_abandons_unfinished_versions(both: Afterwards) -> None:
    both.stopping.set()
    with pytest.raises(Stopped):
        both.deriving.synthesize("r", _RULE, None)
    assert list(both.core.data_dir.derived_folder("r").iterdir()) == []


def test_run_without_a_ring_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with afterwards(tmp_path) as both:
        joined(both.core.join("r", _MANIFEST))
        _fill(both, 2)
        with pytest.raises(CannotSynthesize, match=r"begin the run with at least two.*--ring-every-steps"):
            both.deriving.synthesize("r", _RULE, None)
