"""A pass equals a float64 loop, for every dtype and block size; the sink sees the content before the pass."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.compute.accelerator import Accelerator
from ema_server.compute.device import BLOCK_ELEMENTS
from ema_server.compute.kernel import Source, Target
from ema_server.compute.pool import WorkerPool
from ema_server.tensors.dtypes import view
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, held_nbytes, places, segments
from ema_server.tensors.selection import can_be_averaged
from support.arithmetics import NAMES, arithmetic
from support.backends import InlineBackend
from support.server_core import all_segments, encode, manifest_of

_SHARES = [("torch", *share) for share in ((1, 1), (3, 1), (2, 3), (1, 64), (2, BLOCK_ELEMENTS))]
_SHARES += [("compiled", *share) for share in ((3, 1), (1, 64), (2, BLOCK_ELEMENTS))]


@pytest.fixture(params=[*_SHARES, ("elsewhere", 1, 3)], ids="{0[0]}, {0[1]} x {0[2]}".format)
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    """Kernel, threads and elements per block; and one whose averages are on a device."""
    name, workers, block_elements = request.param
    if name == "elsewhere":
        pool = WorkerPool(workers, block_elements, Accelerator("test:0", InlineBackend(), block_elements))
    else:
        pool = WorkerPool(workers, block_elements, arithmetic=arithmetic(name))
    yield pool
    pool.close()


def _tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "double": torch.randn(5, dtype=torch.float64),
        "single": torch.randn(4, 9),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "brain": torch.randn(11).bfloat16(),
        "half": torch.randn(7).half(),
        "u": torch.randn(6),
        "count": torch.tensor(seed + 2**40),
        "small": torch.tensor([seed % 100, -3], dtype=torch.int8),
        "flags": torch.rand(5) > 0.5,
    }


_FAR = 3 << 20  # elements: beyond the first piece of a check
_MANIFEST = manifest_of(_tensors(0), {"u": Role.STRUCTURAL})


def _held(manifest: Manifest, form: Form, data: Tensor) -> dict[str, Tensor]:
    return {
        place.tensor.name: view(data, place.dtype, place.offset, place.tensor.elements).reshape(place.tensor.shape)
        for place in places(manifest, form)
    }


def _target(form: Form, weight: float | None) -> Target:
    return Target(torch.zeros(held_nbytes(_MANIFEST, form), dtype=torch.uint8), form, weight)


def _filled(pool: WorkerPool, form: Form, weight: float | None, seed: int) -> Target:
    target = _target(form, None)
    pool.update(all_segments(_MANIFEST), encode(_MANIFEST, _tensors(seed)), [target], None)
    return Target(target.data, form, weight)


class _Recorder:
    def __init__(self, targets: list[Target]) -> None:
        self._targets = targets
        self.seen = [torch.zeros_like(target.data) for target in targets]
        self.ranges: list[list[tuple[int, int]]] = [[] for _ in targets]

    def write(self, index: int, begin: int, end: int) -> None:
        self.seen[index][begin:end] = self._targets[index].data[begin:end]
        self.ranges[index].append((begin, end))


@pytest.mark.parametrize("form", [Form.WIDE, Form.EXACT])
@pytest.mark.parametrize("weight", [0.001, 0.3, 0.75, 1.0])
def test_pass_equals_a_float64_loop(pool: WorkerPool, form: Form, weight: float) -> None:
    """Within three roundings of values below 8: 3 * 8 * eps of the accumulator's dtype."""
    target = _filled(pool, form, weight, 1)
    pool.update(all_segments(_MANIFEST), encode(_MANIFEST, _tensors(2)), [target], None)

    old, new, held = _tensors(1), _tensors(2), _held(_MANIFEST, form, target.data)
    for name, value in held.items():
        if name in ("u", "count", "small", "flags"):
            assert torch.equal(value, new[name]), name
            continue
        expected = old[name].double() * (1 - weight) + new[name].double() * weight
        assert value.dtype is (torch.float64 if name == "double" or form is Form.EXACT else torch.float32)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=24 * torch.finfo(value.dtype).eps)


@pytest.mark.parametrize("form", list(Form))
def test_pass_without_weight_copies_exactly(pool: WorkerPool, form: Form) -> None:
    target = _filled(pool, form, None, 3)
    held = _held(_MANIFEST, form, target.data)
    for name, value in _tensors(3).items():
        assert torch.equal(held[name], value.to(held[name].dtype)), name
    if form is Form.WIRE:
        assert torch.equal(target.data, encode(_MANIFEST, _tensors(3)))


def test_joint_pass_equals_separate_passes(pool: WorkerPool) -> None:
    plan = [(Form.WIDE, 0.1), (Form.WIRE, None), (Form.EXACT, 0.9), (Form.WIDE, None), (Form.EXACT, None)]
    together = [_filled(pool, form, weight, 5) for form, weight in plan]
    alone = [_filled(pool, form, weight, 5) for form, weight in plan]
    snapshot = encode(_MANIFEST, _tensors(6))
    pool.update(all_segments(_MANIFEST), snapshot, together, None)
    for target in alone:
        pool.update(all_segments(_MANIFEST), snapshot, [target], None)

    assert all(torch.equal(one.data, other.data) for one, other in zip(together, alone, strict=True))


def test_window_mean_is_that_of_its_snapshots_and_changes_no_other_average(pool: WorkerPool) -> None:
    """The newest snapshot comes in by the same pass, and half floats are widened for the window and for the others."""
    snapshots = [_filled(pool, Form.WIRE, 0.0, seed) for seed in (1, 2, 3)]
    snapshots[0] = Target(snapshots[0].data, Form.WIRE, None)  # the oldest gives its place to the newest, seed 6
    order = zip((1, 2, 0), (1.0, 1 / 2, 1 / 3), strict=True)
    mix = tuple(Source(snapshots[slot].data, Form.WIRE, weight) for slot, weight in order)
    means = [Target(_filled(pool, form, None, 5).data, form, None, 0, mix) for form in (Form.WIDE, Form.EXACT)]
    others = [_filled(pool, form, 0.25, 5) for form in (Form.WIDE, Form.EXACT, Form.WIDE)]
    alone = [_filled(pool, form, 0.25, 5) for form in (Form.WIDE, Form.EXACT, Form.WIDE)]
    snapshot = encode(_MANIFEST, _tensors(6))
    pool.update(
        all_segments(_MANIFEST), snapshot, [others[0], *snapshots, means[0], others[1], means[1], others[2]], None
    )
    for target in alone:
        pool.update(all_segments(_MANIFEST), snapshot, [target], None)

    assert all(torch.equal(one.data, other.data) for one, other in zip(others, alone, strict=True))
    assert torch.equal(snapshots[0].data, snapshot)
    assert torch.equal(snapshots[1].data, encode(_MANIFEST, _tensors(2)))
    for mean in means:
        for name, value in _held(_MANIFEST, mean.form, mean.data).items():
            if name in ("u", "count", "small", "flags"):
                assert torch.equal(value, _tensors(6)[name]), name
                continue
            expected = sum(_tensors(seed)[name].double() for seed in (2, 3, 6)) / 3
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=48 * torch.finfo(value.dtype).eps)


def test_constant_is_a_fixed_point_bit_for_bit(pool: WorkerPool) -> None:
    """The form `d * a + (1 - d) * p` drifts here: its two rounded factors do not add up to 1."""
    target = _filled(pool, Form.WIDE, 1 - 0.9998, 7)
    before, snapshot = target.data.clone(), encode(_MANIFEST, _tensors(7))
    for _ in range(100):
        pool.update(all_segments(_MANIFEST), snapshot, [target], None)

    assert torch.equal(target.data, before)


@pytest.mark.parametrize("form", list(Form))
def test_weight_of_zero_changes_no_byte(pool: WorkerPool, form: Form) -> None:
    target = _filled(pool, form, 0.0, 7)
    before = target.data.clone()
    pool.update(all_segments(_MANIFEST), encode(_MANIFEST, _tensors(8)), [target], None)

    assert torch.equal(target.data, before)


def test_blocks_outside_the_mask_are_copied(pool: WorkerPool) -> None:
    """Three averages in one pass, each with its own bit: the one with number 1 averages all but `brain`."""
    targets = [_filled(pool, form, 0.25, 1) for form in (Form.WIDE, Form.WIDE, Form.EXACT)]
    targets = [Target(target.data, target.form, 0.25, number) for number, target in enumerate(targets)]

    def averaged_by(tensor: TensorSpec) -> int:
        return (0b101 if tensor.name == "brain" else 0b111) if can_be_averaged(tensor) else 0

    pool.update(segments(_MANIFEST, averaged_by), encode(_MANIFEST, _tensors(2)), targets, None)

    held = [_held(_MANIFEST, target.form, target.data) for target in targets]
    new = _tensors(2)["brain"].float()
    expected = torch.lerp(_tensors(1)["brain"].float(), new, 0.25)
    assert torch.equal(held[1]["brain"], new)
    assert torch.equal(held[0]["brain"], expected)
    torch.testing.assert_close(held[2]["brain"].float(), expected)
    assert torch.equal(held[0]["single"], held[1]["single"])


def test_sink_sees_every_byte_once_and_before_it_changes(pool: WorkerPool) -> None:
    plan = [(Form.WIDE, 0.5), (Form.WIRE, None), (Form.EXACT, 0.5), (Form.WIDE, 0.0)]
    targets = [_filled(pool, form, weight, 1) for form, weight in plan]
    before = [target.data.clone() for target in targets]
    riding, alone = _Recorder(targets), _Recorder(targets)
    pool.write(all_segments(_MANIFEST), [target.form for target in targets], alone)
    assert all(torch.equal(target.data, old) for target, old in zip(targets, before, strict=True))
    pool.update(all_segments(_MANIFEST), encode(_MANIFEST, _tensors(2)), targets, riding)

    for recorder in (alone, riding):
        for seen, old, ranges in zip(recorder.seen, before, recorder.ranges, strict=True):
            assert torch.equal(seen, old)
            ranges.sort()
            assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]


def test_all_kernels_give_the_same_bytes() -> None:
    """So a run may go on with another one after a restart. The weights are those of a run's beginning and later."""
    plan = [(Form.WIDE, 1.0), (Form.EXACT, 0.5), (Form.WIDE, 0.3), (Form.WIRE, None), (Form.WIDE, 0.01)]
    left = []
    for name in NAMES:
        pool = WorkerPool(2, 3, arithmetic=arithmetic(name))
        targets = [_filled(pool, form, weight, 1) for form, weight in plan]
        for step in range(1, 20):
            weights = [weight and weight / step for _, weight in plan]
            targets = [replace(target, weight=weight) for target, weight in zip(targets, weights, strict=True)]
            pool.update(all_segments(_MANIFEST), encode(_MANIFEST, _tensors(step)), targets, None)
        pool.close()
        left.append([target.data for target in targets])

    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.process
def test_passes_allocate_no_memory_of_the_models_size(name: str) -> None:
    """128 MiB of bfloat16 into four averages, one in float64: after the first pass the process does not grow."""
    script = """
        import resource, sys, torch
        from ema_proto.wire.manifest import Role, TensorSpec, layout
        from ema_server.compute.pool import WorkerPool
        from ema_server.compute.kernel import Target
        from ema_server.compute.select import choose
        from ema_server.tensors.layout import Form, held_nbytes, segments
        from ema_server.compute.memory import allocate
        manifest = layout([TensorSpec("w", "BF16", (64 << 20,), Role.PARAM, 0)])
        forms = (Form.WIRE, Form.WIDE, Form.WIDE, Form.EXACT)
        weights = (None, 0.1, 0.1, 0.1)
        targets = [Target(allocate(held_nbytes(manifest, f)).data, f, w) for f, w in zip(forms, weights)]
        snapshot = allocate(manifest.nbytes).data.fill_(60)
        pool = WorkerPool(2, arithmetic=choose(sys.argv[1], torch.device("cpu")))
        pool.update(segments(manifest, lambda _: -1), snapshot, targets, None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(5):
            pool.update(segments(manifest, lambda _: -1), snapshot, targets, None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        pool.close()
    """
    arithmetic(name)  # or the test is skipped
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), name], capture_output=True, text=True, timeout=100, check=True
    )

    assert int(done.stdout) < 4 << 10, f"grew by {done.stdout} KiB"


@pytest.mark.parametrize("at", [0, _FAR - 1])
def test_check_of_a_snapshot_names_its_tensors_with_nan(pool: WorkerPool, at: int) -> None:
    tensors = {"a": torch.zeros(2), "long": torch.zeros(_FAR), "n": torch.tensor([3])}
    manifest = manifest_of(tensors)
    check = FiniteCheck(manifest)
    assert pool.not_finite(check, encode(manifest, tensors)) == ()

    tensors["long"][at] = math.nan
    assert pool.not_finite(check, encode(manifest, tensors)) == ("long",)

    tensors["a"][1] = math.inf
    assert pool.not_finite(check, encode(manifest, tensors)) == ("a", "long")
