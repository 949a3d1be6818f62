"""A blend is the float64 sum of versions, rounded once; what averages copy comes from the first version."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Applied
from ema_server.derived import combine as combining
from ema_server.derived.blend import BadWeights, CannotBlend, Weighted, blend, check_weights, default_name
from ema_server.derived.queue import NameTaken, Stopped
from ema_server.storage.catalog import Version, VersionGone
from ema_server.storage.records import BrokenGeneration
from support.afterwards import Afterwards, afterwards
from support.examples import examples
from support.oracle import EPS32
from support.server_core import durable, joined, manifest_of

_AVERAGES = ("raw", "ema:0.9", "ema:0.5,buffers=copy,exclude=w,name=copying")
_SUMMED = ("d", "w", "half", "tiny", "one", "mean")
_COPIED = ("mask", "frozen", "n", "flag", "none")


def _weights(step: int) -> dict[str, Tensor]:
    """Weights of every kind; `mask` is not finite from the first snapshot on, so it is copied."""
    generator = torch.Generator().manual_seed(step)
    return {
        "half": (torch.rand(11, generator=generator) - 0.5).bfloat16(),
        "d": torch.rand(7, generator=generator, dtype=torch.float64) - 0.5,
        "w": torch.rand(300, 3, generator=generator) - 0.5,
        "mask": torch.tensor([0.0, -math.inf, float(step)]),
        "tiny": (torch.rand(3, generator=generator) - 0.5).half(),
        "frozen": torch.full((5,), 0.1),
        "n": torch.tensor(step),
        "flag": torch.tensor([step % 2 == 0]),
        "none": torch.zeros(0),
        "one": torch.tensor(float(step)),
        "mean": torch.rand(3, generator=generator),
    }


_ROLES = {"mask": Role.BUFFER, "frozen": Role.FROZEN, "mean": Role.BUFFER}
_MANIFEST = manifest_of(_weights(1), roles=_ROLES, aliases={"w": ("w.tied", "w.again")})


@contextmanager
def _three_runs(data: Path) -> Iterator[Afterwards]:
    """The runs `a`, `b` and `other`, of four generations each; `other` has another model."""
    with afterwards(data) as both:
        wider = manifest_of({**_weights(1), "w": torch.zeros(300, 4)}, roles=_ROLES)
        joined(both.core.join("a", _MANIFEST, _AVERAGES, config='{"width": 3}'))
        joined(both.core.join("b", _MANIFEST, _AVERAGES))
        joined(both.core.join("other", wider, _AVERAGES))
        for step in range(1, 5):
            assert isinstance(both.core.apply("a", step, _weights(step)), Applied)
            assert isinstance(both.core.apply("b", step, _weights(step + 100)), Applied)
            assert isinstance(both.core.apply("other", step, {**_weights(step), "w": torch.zeros(300, 4)}), Applied)
            for run in ("a", "b", "other"):
                durable(both.core.publish(run))
        yield both


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Afterwards]:
    with _three_runs(tmp_path_factory.mktemp("data")) as both:
        yield both


@pytest.fixture
def both(shared: Afterwards) -> Iterator[Afterwards]:
    """Three runs without a blend."""
    yield shared
    for version in shared.core.catalog.derived("a"):
        assert shared.store.delete(version)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Afterwards]:
    """Three runs of a test that damages or stops something."""
    with _three_runs(tmp_path) as both:
        yield both


def _found(both: Afterwards, target: str) -> Version:
    name, _, rev = target.partition("@")
    run, _, average = name.partition("/")
    version = both.core.catalog.find(run, average, rev or "latest")
    assert version is not None, target
    return version


def _inputs(both: Afterwards, targets: dict[str, float]) -> list[Weighted]:
    return [Weighted(_found(both, target), weight) for target, weight in targets.items()]


def _blend(both: Afterwards, targets: dict[str, float], name: str = "mixed") -> Version:
    return blend(both.deriving, _inputs(both, targets), name)[0]


def _tensors(version: Version) -> dict[str, Tensor]:
    return load_file(version.folder / "model.safetensors")


def _record(version: Version) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((version.folder / "version.json").read_text())
    return found


def _is_sum(made: Tensor, name: str, stored: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> bool:
    """Whether `made` is the float64 sum, rounded once to float32; the order of float64 operations is free."""
    terms = [weight * tensors[name].double() for tensors, weight in zip(stored, weights, strict=True)]
    exact, size = torch.stack(terms).sum(0), torch.stack(terms).abs().sum(0)
    return bool(((made.double() - exact).abs() <= EPS32 * exact.abs() + 1e-14 * size).all())


@pytest.mark.parametrize("chunk", [64, 1 << 17])
@pytest.mark.parametrize(
    "targets",
    [
        {"a/ema-0.9": 0.7, "a/raw": 0.3},
        {"a/raw": 0.3, "a/ema-0.9": 0.7},
        {"a/raw": 0.5, "a/raw@step-2": 0.25, "a/raw@step-3": 0.25},
        {"a/ema-0.9": 1.5, "b/ema-0.9": -0.5},
        {"a/ema-0.9@step-2": 0.2, "b/raw@step-3": 0.3, "a/raw@step-4": 0.5},
        {"a/raw": 0.0, "a/ema-0.9": 1.0},
    ],
)
def test_blend_is_the_float64_sum_rounded_once(
    both: Afterwards, monkeypatch: pytest.MonkeyPatch, targets: dict[str, float], chunk: int
) -> None:
    monkeypatch.setattr(combining, "_CHUNK_ELEMENTS", chunk)
    version = _blend(both, targets)
    made, stored = _tensors(version), [_tensors(_found(both, target)) for target in targets]

    for name in _SUMMED:
        assert made[name].dtype == torch.float32
        assert _is_sum(made[name], name, stored, tuple(targets.values())), name
    for name in _COPIED:
        assert made[name].dtype == stored[0][name].dtype, name
        assert torch.equal(made[name], stored[0][name]), name
    for tied in ("w.tied", "w.again"):
        assert torch.equal(made[tied], made["w"])
    assert {name: value.shape for name, value in made.items()} == {
        name: value.shape for name, value in stored[0].items()
    }


@pytest.mark.parametrize("targets", [{"a/copying": 0.5, "a/ema-0.9": 0.5}, {"a/raw": 0.5, "a/copying": 0.5}])
def test_first_rule_that_averages_decides_what_is_copied(both: Afterwards, targets: dict[str, float]) -> None:
    made, stored = _tensors(_blend(both, targets)), [_tensors(_found(both, target)) for target in targets]

    for name in ("w", "mean"):
        assert torch.equal(made[name], stored[0][name])
    assert _is_sum(made["d"], "d", stored, (0.5, 0.5))


def test_blend_is_described_by_its_first_version_and_names_its_inputs(both: Afterwards) -> None:
    targets = {"a/ema-0.9@step-2": 0.75, "b/raw@step-3": 0.25}
    first, second = (_found(both, target) for target in targets)
    version = _blend(both, targets)

    assert (version.run, version.average, version.step, version.updates) == ("a", "mixed", 2, 2)
    assert (version.spec, version.derived) == ("ema:0.9", "blended")
    assert (version.folder / "config.json").read_text() == '{"width": 3}'
    derived = _record(version)["derived"]
    assert derived["inputs"] == [
        {"run": "a", "average": "ema-0.9", "step": 2, "id": first.id, "weight": 0.75},
        {"run": "b", "average": "raw", "step": 3, "id": second.id, "weight": 0.25},
    ]
    assert [(one["weight"], one["ledger"]) for one in derived["ledgers"]] == [
        (0.75, _record(first)["ledger"]),
        (0.25, _record(second)["ledger"]),
    ]


def test_blend_of_a_blend_has_the_ledgers_of_its_parts(own: Afterwards) -> None:
    _blend(own, {"a/ema-0.9": 0.5, "a/raw": 0.5}, "inner")
    outer = _blend(own, {"a/inner": 0.5, "a/raw": 0.5}, "outer")

    shares = [(one["average"], one["weight"]) for one in _record(outer)["derived"]["ledgers"]]
    assert shares == [("ema-0.9", 0.25), ("raw", 0.25), ("raw", 0.5)]
    assert outer.spec == "ema:0.9"


def test_same_blend_again_is_the_same_version(both: Afterwards) -> None:
    inputs = _inputs(both, {"a/ema-0.9": 0.7, "a/raw": 0.3})
    first, is_new = blend(both.deriving, inputs, "mixed")
    again, again_new = blend(both.deriving, inputs, "mixed")
    assert (again, is_new, again_new) == (first, True, False)

    assert both.store.delete(first)
    made, made_new = blend(both.deriving, inputs, "mixed")
    assert (made.id, made_new) == (first.id, True), "the id follows from the content"


def test_name_stands_for_one_sum_at_several_steps(both: Afterwards) -> None:
    versions = [_blend(both, {f"a/ema-0.9@step-{step}": 0.7, f"a/raw@step-{step}": 0.3}) for step in (2, 3)]
    assert both.core.catalog.versions("a", "mixed") == (versions[1], versions[0])
    for other in ({"a/ema-0.9": 0.6, "a/raw": 0.4}, {"a/raw": 0.7, "a/ema-0.9": 0.3}):
        with pytest.raises(NameTaken, match="'mixed' of run 'a' is blended, of other averages or weights"):
            _blend(both, other)


def test_runs_of_different_models_are_refused_by_the_first_tensor_that_differs(both: Afterwards) -> None:
    with pytest.raises(CannotBlend) as refused:
        _blend(both, {"a/raw": 0.5, "other/raw": 0.5})
    assert str(refused.value) == (
        "runs 'a' and 'other' have different models: tensor 'w' is F32 [300, 3], tied with w.tied, w.again in a, and "
        "F32 [300, 4] in other"
    )
    assert both.core.catalog.derived("a") == ()


def test_sum_that_is_not_finite_is_refused_by_its_tensor(both: Afterwards) -> None:
    huge = 1e300
    with pytest.raises(CannotBlend, match=r"the sum of tensor '.*' is NaN or Inf"):
        _blend(both, {"a/raw": huge, "a/raw@step-2": 1.0 - huge})
    assert list(both.core.data_dir.derived_folder("a").iterdir()) == []


def test_buffer_with_nan_in_raw_is_named_unless_its_weight_is_zero(tmp_path: Path) -> None:
    def weights(step: int) -> dict[str, Tensor]:
        return {"w": torch.ones(3), "bn.running_mean": torch.full((2,), math.nan if step > 2 else 1.0)}

    with afterwards(tmp_path) as both:
        joined(both.core.join("a", manifest_of(weights(1), roles={"bn.running_mean": Role.BUFFER}), _AVERAGES))
        for step in (1, 2, 3):
            assert isinstance(both.core.apply("a", step, weights(step)), Applied)
        durable(both.core.publish("a"))
        with pytest.raises(CannotBlend, match=r"tensor 'bn.running_mean' is NaN or Inf: a version of raw has"):
            _blend(both, {"a/ema-0.9": 0.5, "a/raw": 0.5})
        made = _tensors(_blend(both, {"a/ema-0.9": 1.0, "a/raw": 0.0}, "only-ema"))
    assert made["bn.running_mean"].isfinite().all()


@pytest.mark.parametrize("target", ["a/ema-0.9", "a/raw"])
def test_flipped_byte_in_an_input_is_found_and_nothing_is_written(own: Afterwards, target: str) -> None:
    path = _found(own, target).folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.unlink()
    path.write_bytes(data)

    with pytest.raises(BrokenGeneration, match=r"model.safetensors has sha256 .* instead of"):
        _blend(own, {"a/ema-0.9": 0.5, "a/raw": 0.5})
    assert own.core.catalog.derived("a") == ()
    assert list(own.core.data_dir.derived_folder("a").iterdir()) == []


def test_deleted_input_and_stopping_server_leave_nothing(own: Afterwards) -> None:
    inner = _blend(own, {"a/ema-0.9": 0.5, "a/raw": 0.5}, "inner")
    inputs = _inputs(own, {"a/raw": 0.5, "a/inner": 0.5})
    assert own.store.delete(inner)
    with pytest.raises(VersionGone):
        blend(own.deriving, inputs, "outer")
    own.stopping.set()
    with pytest.raises(Stopped):
        _blend(own, {"a/ema-0.9": 0.5, "a/raw": 0.5})
    assert list(own.core.data_dir.derived_folder("a").iterdir()) == []


def test_default_name_has_averages_weights_and_what_differs(both: Afterwards) -> None:
    named = {
        "ema-0.9_0.7-raw_0.3": {"a/ema-0.9": 0.7, "a/raw": 0.3},
        "ema-0.9_1.3-raw_-0.3": {"a/ema-0.9": 1.3, "a/raw": -0.3},
        "raw.4_0.5-raw.2_0.5": {"a/raw": 0.5, "a/raw@step-2": 0.5},
        "raw_0.5-b.raw_0.5": {"a/raw": 0.5, "b/raw": 0.5},
    }
    for name, targets in named.items():
        assert default_name(_inputs(both, targets)) == name


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ((1.0, 1.0, 2.0), "the weights 1, 1, 2 add up to 4, not to 1; divided by it they are 0.25, 0.25, 0.5"),
        ((1.0, -1.0), "the weights 1, -1 add up to 0, not to 1"),
        ((0.5, 0.500002), "add up to 1.000002, not to 1"),
        ((math.nan, 1.0), "the weights are nan, 1: use finite numbers"),
        ((math.inf, -math.inf), "use finite numbers"),
    ],
)
def test_weights_that_do_not_add_up_to_one_are_refused(weights: tuple[float, ...], text: str) -> None:
    with pytest.raises(BadWeights) as refused:
        check_weights(weights)
    assert text in str(refused.value)


@settings(max_examples=examples(200))
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_weights_within_rounding_of_one_are_accepted(others: list[float]) -> None:
    last = float(f"{1.0 - math.fsum(others):.17g}")
    check_weights([*others, last])
