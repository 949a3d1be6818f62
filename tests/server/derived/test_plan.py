"""Which averages of a ring are added up to another one, which are not, and what gives a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from ema_proto.averages.profiles import gamma_of
from ema_server.config import RingDtype
from ema_server.derived.plan import ERROR_TRUSTED, CannotSynthesize, make_plan
from ema_server.derived.solve import Profile, solve
from ema_server.publishing.ring_snapshot import RingMember, RingSnapshot
from ema_server.storage.catalog import FileEntry

_SIGMAS = (0.05, 0.10)


def _member(sigma: float, step: int, *, origin: int = 0, began: int = 1, copied: Sequence[str] = ()) -> RingMember:
    name = f"power-{sigma}"
    file = FileEntry(f"{name}.safetensors", 0, "0" * 64)
    spec = f"power:sigma_rel={sigma}"
    return RingMember(name, spec, gamma_of(sigma), f"{step}-{sigma}", step, 0, origin, began, file, frozenset(copied))


def _snapshot(step: int, *members: RingMember, dtype: RingDtype = "float32") -> RingSnapshot:
    return RingSnapshot(Path(f"/ring/{step}"), step, dtype, members)


def _ring(steps: Sequence[int], sigmas: Sequence[float] = _SIGMAS, dtype: RingDtype = "float32") -> list[RingSnapshot]:
    return [_snapshot(step, *(_member(sigma, step) for sigma in sigmas), dtype=dtype) for step in steps]


_FULL = _ring(range(256, 8193, 256))


def test_shares_are_the_solutions(tmp_path: Path) -> None:
    plan = make_plan(_FULL, gamma_of(0.12), 8192)
    stored = [Profile(step, gamma_of(sigma)) for step in range(256, 8193, 256) for sigma in (0.05, 0.10)]
    solution = solve(stored, Profile(8192, gamma_of(0.12)))

    shares = {(part.snapshot.step, part.member.gamma): part.share for part in plan.parts}
    expected = zip(stored, solution.shares, strict=True)
    assert shares == pytest.approx({(at.time, at.gamma): share for at, share in expected if share}, rel=1e-6)
    assert (plan.error, plan.amplification) == pytest.approx((solution.error, solution.amplification), rel=1e-6)
    assert math.fsum(shares.values()) == pytest.approx(1.0)
    assert plan.warning is None
    assert plan.rounding == pytest.approx(solution.amplification * 2**-24)


def test_later_snapshots_are_not_used() -> None:
    plan = make_plan(_FULL, gamma_of(0.12), 5120)

    assert max(part.snapshot.step for part in plan.parts) == plan.newest.snapshot.step == plan.step == 5120
    assert plan.error == pytest.approx(make_plan(_FULL[:20], gamma_of(0.12), 5120).error)


@pytest.mark.parametrize("sigma", [0.02, 0.25])
def test_width_far_from_the_stored_ones_gives_a_warning(sigma: float) -> None:
    plan = make_plan(_FULL, gamma_of(sigma), 8192)

    assert plan.error > ERROR_TRUSTED
    assert plan.warning is not None
    assert f"off by an estimated {plan.error:.1%}" in plan.warning
    assert "or 32 snapshots are too few; the server's --ring-every-steps and --ring-size" in plan.warning


@pytest.mark.parametrize("sigma", [0.03, 0.04, 0.07, 0.12, 0.20])
def test_width_in_the_trusted_range_gives_no_warning(sigma: float) -> None:
    assert make_plan(_FULL, gamma_of(sigma), 8192).warning is None


@pytest.mark.parametrize(
    ("ring", "sigma", "text"),
    [
        (_FULL, 0.28, "from power-0.05, power-0.1 in 32 snapshots, would be off by an estimated 13%"),
        (_FULL[:2], 0.15, r"be off by an estimated 22%: ask for a width closer to theirs, or for a step"),
        (
            _ring([8192], [0.05]),
            0.12,
            "two power averages of different widths are needed, and at step 8192 the ring has power-0.05",
        ),
        (_ring([100]), 0.12, "no snapshot of step 8192: the nearest is of step 100, it has 1 from 100 to 100"),
        (_ring([100, 8000, 9000]), 0.12, "the nearest is of step 8000 and of step 9000, it has 3 from 100 to 9000"),
    ],
)
def test_too_inexact_average_is_refused_with_what_to_do(ring: list[RingSnapshot], sigma: float, text: str) -> None:
    with pytest.raises(CannotSynthesize, match=text):
        make_plan(ring, gamma_of(sigma), 512 if ring[-1].step == 512 else 8192)


def test_amplified_bfloat16_rounding_gives_a_warning() -> None:
    plan = make_plan(_ring(range(256, 8193, 256), dtype="bfloat16"), gamma_of(0.03), 8192)

    assert plan.error < ERROR_TRUSTED
    assert plan.warning is not None
    assert "rounding errors of the stored tensors become 10.5 times as large, at most 2.1%" in plan.warning
    assert plan.rounding == pytest.approx(plan.amplification * 2**-9)


def test_averages_of_different_origins_are_not_mixed() -> None:
    """Two came later: their profiles are like the first ones', what they hold is not."""
    ring = [
        _snapshot(
            step,
            *(_member(sigma, step) for sigma in _SIGMAS),
            *(_member(sigma, step, origin=500, began=501) for sigma in (0.06, 0.12)),
        )
        for step in range(600, 8001, 200)
    ]
    plan = make_plan(ring, gamma_of(0.12), 8000)

    assert {part.member.origin for part in plan.parts} == {0}
    assert plan.origin == 0


def test_average_added_during_the_run_counts_its_own_time() -> None:
    """Where only the later ones can do it, time counts from where they began."""
    ring = [
        _snapshot(step, _member(0.05, step), *(_member(sigma, step, origin=500, began=501) for sigma in (0.06, 0.11)))
        for step in range(600, 8001, 100)
    ]
    plan = make_plan(ring, gamma_of(0.08), 8000)
    stored = [Profile(step - 500, gamma_of(sigma)) for step in range(600, 8001, 100) for sigma in (0.06, 0.11)]

    assert plan.origin == 500
    assert {part.member.origin for part in plan.parts} == {500}
    assert plan.error == pytest.approx(solve(stored, Profile(7500, gamma_of(0.08))).error, rel=1e-6)


def test_averages_from_before_and_after_a_set_are_not_mixed() -> None:
    before = [_snapshot(step, *(_member(sigma, step) for sigma in _SIGMAS)) for step in range(100, 1001, 100)]
    after = [
        _snapshot(step, *(_member(sigma, step, began=1050) for sigma in _SIGMAS)) for step in range(1100, 2001, 100)
    ]
    plan = make_plan(before + after, gamma_of(0.08), 2000)

    assert {part.member.began for part in plan.parts} == {1050}


def test_averages_that_copy_different_tensors_are_not_mixed() -> None:
    ring = [
        _snapshot(
            step,
            *(_member(sigma, step) for sigma in _SIGMAS),
            *(_member(sigma, step, copied=["mean"]) for sigma in (0.06, 0.12)),
        )
        for step in range(100, 3001, 100)
    ]
    plan = make_plan(ring, gamma_of(0.11), 3000)

    assert len({part.member.copied for part in plan.parts}) == 1


def test_closest_of_many_averages_are_used() -> None:
    sigmas = [0.01 * number for number in range(1, 16)]
    plan = make_plan(_ring(range(100, 1001, 100), sigmas), gamma_of(0.125), 1000)

    assert {part.member.average for part in plan.parts} <= {f"power-{sigma}" for sigma in sigmas[7:]}
    assert plan.error < 1e-3
