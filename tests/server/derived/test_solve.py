"""The shares of stored profiles give the wanted one, with the stated error; figures of Karras et al."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy
import pytest

from ema_proto.averages.profiles import gamma_of
from ema_server.derived.solve import Profile, solve

_STEPS = 8192
_STORED = tuple(Profile(time, gamma_of(sigma)) for time in range(256, _STEPS + 1, 256) for sigma in (0.05, 0.10))


def _wanted(sigma: float, time: float = _STEPS) -> Profile:
    return Profile(time, gamma_of(sigma))


def _weights(profile: Profile, steps: int = _STEPS) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    """The share of each step in a power average whose update is exact: by its definition, in float64."""
    edges = numpy.minimum(numpy.arange(steps + 1) / profile.time, 1.0) ** (profile.gamma + 1)
    return numpy.diff(edges)


@pytest.mark.parametrize(
    ("sigma", "error"),
    [
        (0.02, "4.0e-02"),
        (0.03, "1.1e-02"),
        (0.075, "9.0e-04"),
        (0.15, "2.3e-03"),
        (0.20, "6.5e-03"),
        (0.25, "3.4e-02"),
        (0.28, "1.3e-01"),
    ],
)
def test_error_is_that_of_the_method_for_64_inputs(sigma: float, error: str) -> None:
    assert f"{solve(_STORED, _wanted(sigma)).error:.1e}" == error


@pytest.mark.parametrize(("sigma", "amplification"), [(0.02, "27.6"), (0.15, "1.7")])
def test_rounding_is_amplified_by_the_sum_of_absolute_shares(sigma: float, amplification: str) -> None:
    solution = solve(_STORED, _wanted(sigma))

    assert solution.amplification == math.fsum(abs(share) for share in solution.shares)
    assert f"{solution.amplification:.{len(amplification.split('.')[1])}f}" == amplification


@pytest.mark.parametrize("sigma", [0.05, 0.10])
def test_stored_profile_is_found_exactly_and_used_alone(sigma: float) -> None:
    solution = solve(_STORED, _wanted(sigma))

    assert (solution.error, solution.amplification) == (0.0, 1.0)
    assert [profile for profile, share in zip(_STORED, solution.shares, strict=True) if share] == [_wanted(sigma)]


@pytest.mark.parametrize("sigma", [0.05, 0.10])
def test_error_next_to_a_stored_profile_is_float64s(sigma: float) -> None:
    """At the very width the method's figures are 5e-15 and 1e-14: rounding alone."""
    nearly = Profile(_STEPS, gamma_of(sigma) * (1 + 1e-15))
    solution = solve(_STORED, nearly)

    assert nearly not in _STORED
    assert solution.error < 1e-12
    assert [share for share in solution.shares if share] == pytest.approx([1.0])


@pytest.mark.parametrize("sigma", [0.02, 0.03, 0.06, 0.12, 0.15, 0.20, 0.28])
def test_error_is_the_distance_between_the_step_weights(sigma: float) -> None:
    """As closely as steps tell it: the profiles of the first snapshots grow within one."""
    solution = solve(_STORED, _wanted(sigma))
    mixed = sum(share * _weights(profile) for share, profile in zip(solution.shares, _STORED, strict=True))
    target = _weights(_wanted(sigma))

    assert math.fsum(solution.shares) == pytest.approx(1.0, abs=1e-12)
    assert solution.error == pytest.approx(numpy.linalg.norm(mixed - target) / numpy.linalg.norm(target), rel=5e-5)


def _distance_in_closed_form(stored: Sequence[Profile], shares: Sequence[float], wanted: Profile) -> float:
    """From the profiles' inner products; in float64 they would cancel."""
    with localcontext(prec=50):
        parts = [
            (Decimal(profile.time), Decimal(profile.gamma), Decimal(share))
            for profile, share in zip([*stored, wanted], [*shares, -1.0], strict=True)
        ]
        total = Decimal(0)
        for (time_a, gamma_a, share_a), (time_b, gamma_b, share_b) in itertools.product(parts, parts):
            early, late = sorted([(time_a, gamma_a), (time_b, gamma_b)])
            left = (late[1] * (early[0] / late[0]).ln()).exp()
            scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * late[0])
            total += share_a * share_b * scale * left
        time, gamma, _ = parts[-1]
        return float((total * (2 * gamma + 1) * time).sqrt() / (gamma + 1))


@pytest.mark.parametrize("widths", [(1e-5, 2e-5), (1e-6, 0.1), (1e-4, 1e-3), (0.05, 0.1)], ids=str)
@pytest.mark.parametrize("sigma", [1e-6, 1.5e-5, 2e-4, 0.03, 0.15])
@pytest.mark.parametrize("snapshots", [1, 8])
def test_error_is_the_distance_for_narrow_profiles_too(
    widths: tuple[float, float], sigma: float, snapshots: int
) -> None:
    times = [_STEPS * number / snapshots for number in range(1, snapshots + 1)]
    stored = [Profile(time, gamma_of(width)) for time in times for width in widths]
    solution = solve(stored, _wanted(sigma))

    expected = _distance_in_closed_form(stored, solution.shares, _wanted(sigma))
    assert solution.error == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("change", [1.01, 0.99])
def test_no_other_shares_are_better(change: float) -> None:
    solution = solve(_STORED, _wanted(0.13))
    target = _weights(_wanted(0.13))
    for index in range(0, len(_STORED), 7):
        shares = list(solution.shares)
        shares[index] *= change
        mixed = sum(share * _weights(profile) for share, profile in zip(shares, _STORED, strict=True))
        assert numpy.linalg.norm(mixed - target) / numpy.linalg.norm(target) > solution.error * (1 - 1e-6)


def test_duplicate_profile_changes_nothing() -> None:
    once, twice = solve(_STORED, _wanted(0.15)), solve(_STORED + _STORED[::2], _wanted(0.15))

    assert twice.error == pytest.approx(once.error, rel=1e-6)
    assert twice.amplification == pytest.approx(once.amplification, rel=1e-6)


def test_shares_do_not_depend_on_the_unit_of_time() -> None:
    stretched = tuple(Profile(profile.time * 1e5, profile.gamma) for profile in _STORED)
    solution, stretched_solution = solve(_STORED, _wanted(0.12)), solve(stretched, _wanted(0.12, _STEPS * 1e5))

    assert stretched_solution.shares == pytest.approx(solution.shares, abs=1e-9)
    assert stretched_solution.error == pytest.approx(solution.error, rel=1e-6)


@pytest.mark.parametrize("stored", [(), (Profile(8193, 1.0),), (Profile(0, 1.0),)])
def test_profiles_beyond_the_requested_time_are_refused(stored: tuple[Profile, ...]) -> None:
    with pytest.raises(ValueError, match=r"need stored profiles at times in \(0, 8192\]"):
        solve(stored, _wanted(0.1))
