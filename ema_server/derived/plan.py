"""Which stored power averages of a ring, with which shares, make another power average.

The averages of a plan have the same origin, were last replaced at the same step and copy the same tensors. Others hold
different weights, even if their profiles are alike. `solve` has the arithmetic, `combine` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ema_server.config import RingDtype
from ema_server.derived.combine import Term
from ema_server.derived.solve import Profile, Solution, solve
from ema_server.publishing.ring_snapshot import RingMember, RingSnapshot

ERROR_MAX = 0.1  # of a profile; beyond it the result would be a different average
ERROR_TRUSTED = 0.015  # met by sigma_rel from 0.03 to 0.22, from 32 snapshots of 0.05 and 0.10
ROUNDING_TRUSTED = 0.015
PROFILES_MAX = 8  # the averages with the closest exponents; others add nothing

_ROUNDOFF: dict[RingDtype, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


class CannotSynthesize(Exception):
    """The ring cannot provide the average; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored average and its share in the sum; with share 0 only its copied tensors are used."""

    snapshot: RingSnapshot
    member: RingMember
    share: float = 0.0

    @property
    def profile(self) -> Profile:
        return Profile(self.snapshot.step - self.member.origin, self.member.gamma)

    @property
    def history(self) -> tuple[int, int, frozenset[str]]:
        """Equal for averages that may be added up."""
        return self.member.origin, self.member.began, self.member.copied

    @property
    def term(self) -> Term:
        return Term(self.snapshot.folder / self.member.file.name, self.member.file.sha256, self.share)


@dataclass(frozen=True, slots=True)
class Plan:
    """How to compute an average.

    Args:
        step: the step of the average.
        origin: the number of steps already taken when the average would have begun.
        newest: the part that copied tensors are taken from.
        parts: what is added up, by step.
        error: estimated relative L2 error of the profile.
        amplification: sum of the absolute values of the shares.
        rounding: bound on the rounding error of the stored weights in the result, relative to the largest weight.
        warning: why the result is doubtful, or None.
    """

    step: int
    origin: int
    newest: Part
    parts: tuple[Part, ...]
    error: float
    amplification: float
    rounding: float
    warning: str | None

    @property
    def terms(self) -> tuple[Term, ...]:
        """The files to add up, that of `newest` first."""
        newest = self.newest.term
        others = tuple(part.term for part in self.parts)
        return (newest, *(term for term in others if term.path != newest.path))


def make_plan(snapshots: Sequence[RingSnapshot], gamma: float, step: int) -> Plan:
    """How to compute the power average with exponent `gamma` at `step` from a ring.

    If averages began at several steps, those that began first are preferred.

    Args:
        snapshots: the ring of one run.
        gamma: the exponent.
        step: the step of one of the snapshots, since the newest weights count most. Later snapshots are not used.

    Raises:
        CannotSynthesize: it is not possible, or the error would be above `ERROR_MAX`.
    """
    earlier = [snapshot for snapshot in snapshots if snapshot.step <= step]
    stored = [Part(snapshot, member) for snapshot in earlier for member in snapshot.members]
    last = [one for one in stored if one.snapshot.step == step]
    if not last:
        raise CannotSynthesize(_missing(step, sorted(snapshot.step for snapshot in snapshots)))
    histories = sorted({one.history for one in last}, key=lambda each: (each[0], each[1], sorted(each[2])))
    plans = []
    for history in histories:
        usable = [one for one in stored if one.history == history]
        if len({one.member.gamma for one in usable}) > 1:
            plans.append(_plan(usable, gamma, step))
    good = next((plan for plan in plans if plan.error <= ERROR_MAX), None)
    if good is not None:
        return good
    if plans:
        raise CannotSynthesize(_too_inexact(min(plans, key=lambda plan: plan.error), snapshots))
    names = sorted({one.member.average for one in last})
    raise CannotSynthesize(
        f"two power averages of different widths are needed, and at step {step} the ring has {', '.join(names)}: begin "
        "the run with power:sigma_rel=0.05 and power:sigma_rel=0.1, for example, or add one now for later steps"
    )


def _plan(usable: Sequence[Part], gamma: float, step: int) -> Plan:
    usable = sorted(_closest(usable, gamma), key=lambda one: (one.snapshot.step, one.member.average))
    origin = usable[-1].member.origin
    solution = solve([one.profile for one in usable], Profile(step - origin, gamma))
    parts = [replace(one, share=share) for one, share in zip(usable, solution.shares, strict=True)]
    rounding = math.fsum(abs(part.share) * _ROUNDOFF[part.snapshot.dtype] for part in parts)
    return Plan(
        step=step,
        origin=origin,
        newest=parts[-1],
        parts=tuple(part for part in parts if part.share),
        error=solution.error,
        amplification=solution.amplification,
        rounding=rounding,
        warning=_warning(solution, rounding, len({one.snapshot.step for one in usable})),
    )


def _closest(usable: Sequence[Part], gamma: float) -> list[Part]:
    gammas = sorted({one.member.gamma for one in usable}, key=lambda each: abs(math.log((each + 1) / (gamma + 1))))
    return [one for one in usable if one.member.gamma in gammas[:PROFILES_MAX]]


def _warning(solution: Solution, rounding: float, snapshots: int) -> str | None:
    warnings = []
    if solution.error > ERROR_TRUSTED:
        warnings.append(
            f"the weights of the steps are off by an estimated {solution.error:.1%}: the width is far from those of "
            f"the run's averages, or {snapshots} snapshots are too few; the server's --ring-every-steps and "
            "--ring-size set how many are stored"
        )
    if rounding > ROUNDING_TRUSTED:
        warnings.append(
            f"the rounding errors of the stored tensors become {solution.amplification:.1f} times as large, at most "
            f"{rounding:.1%} of the largest value: store them in float32 (--ring-dtype)"
        )
    return "; ".join(warnings) or None


def _too_inexact(plan: Plan, snapshots: Sequence[RingSnapshot]) -> str:
    used = sorted({part.member.average for part in plan.parts})
    steps = [snapshot.step for snapshot in snapshots if snapshot.step <= plan.step]
    return (
        f"the weights of the steps, made from {', '.join(used)} in {len(steps)} snapshots, would be off by an "
        f"estimated {plan.error:.0%}: ask for a width closer to theirs, or for a step with more snapshots before it; "
        "the server's --ring-every-steps and --ring-size set how many are stored"
    )


def _missing(step: int, steps: Sequence[int]) -> str:
    nearest = sorted({*[one for one in steps if one < step][-1:], *[one for one in steps if one > step][:1]})
    shown = " and of step ".join(map(str, nearest))
    return (
        f"the ring has no snapshot of step {step}: the nearest is of step {shown}, it has {len(steps)} from {steps[0]} "
        f"to {steps[-1]}"
    )
