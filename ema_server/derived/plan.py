"""From a ring's snapshots to the plan for one more power average. Pure: values in, a plan or the reason why not out.

The averages of a plan count their time from the same origin, were last replaced at the same step and copy the same
tensors: others hold other weights, however alike their profiles are. The arithmetic is in `posthoc`, the bytes are in
`combining`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ema_server.config import RingDtype
from ema_server.derived.solve import Blend, Profile, solve
from ema_server.publishing.ring_snapshot import RingMember, RingSnapshot

ERROR_MAX = 0.1  # of a profile: the result would be another average than the one that was asked for
ERROR_TRUSTED = 0.015  # with 0.05 and 0.10 and 32 snapshots, sigma_rel from 0.03 to 0.22 is below it
ROUNDING_TRUSTED = 0.015
PROFILES_MAX = 8  # of more averages the closest are used: others add nothing

_ROUNDOFF: dict[RingDtype, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


class CannotSynthesize(Exception):
    """The ring does not suffice for what was asked; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored average and its share in the sum; 0: only its copied tensors are wanted."""

    snapshot: RingSnapshot
    member: RingMember
    share: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How to make an average.

    Args:
        step: the step that it is for.
        origin: the steps already taken when it would have begun.
        newest: the part that copied tensors are taken from.
        parts: what is added up, by step.
        error: estimated relative L2 error of the profile.
        amplification: sum of the shares' absolute values.
        rounding: bound of the stored weights' rounding in the result, relative to the largest of them.
        warning: what makes the result doubtful, None if nothing does.
    """

    step: int
    origin: int
    newest: Part
    parts: tuple[Part, ...]
    error: float
    amplification: float
    rounding: float
    warning: str | None


@dataclass(frozen=True, slots=True)
class _Stored:
    snapshot: RingSnapshot
    member: RingMember

    @property
    def profile(self) -> Profile:
        return Profile(self.snapshot.step - self.member.origin, self.member.gamma)

    @property
    def history(self) -> tuple[int, int, frozenset[str]]:
        """What averages that may be added up have in common."""
        return self.member.origin, self.member.began, self.member.copied


def make_plan(snapshots: Sequence[RingSnapshot], gamma: float, step: int) -> Plan:
    """How to make the power average with exponent `gamma` as of `step` of what a ring holds.

    Where averages began at several steps, those that began first are taken, unless they cannot do it.

    Args:
        snapshots: those of one run.
        gamma: the exponent.
        step: of one of the snapshots: what happened after the last one weighs most, and is in none. Later ones are not
            used.

    Raises:
        CannotSynthesize: it cannot be made, or would not be that average.
    """
    earlier = [snapshot for snapshot in snapshots if snapshot.step <= step]
    stored = [_Stored(snapshot, member) for snapshot in earlier for member in snapshot.members]
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
        raise CannotSynthesize(_useless(min(plans, key=lambda plan: plan.error), snapshots))
    names = sorted({one.member.average for one in last})
    raise CannotSynthesize(
        f"it takes two power averages of different width, and at step {step} the ring has {', '.join(names)}: begin "
        "the run with power:sigma_rel=0.05 and power:sigma_rel=0.1, for example, or add one now for what comes"
    )


def _plan(usable: Sequence[_Stored], gamma: float, step: int) -> Plan:
    usable = sorted(_closest(usable, gamma), key=lambda one: (one.snapshot.step, one.member.average))
    origin = usable[-1].member.origin
    blend = solve([one.profile for one in usable], Profile(step - origin, gamma))
    parts = [Part(one.snapshot, one.member, share) for one, share in zip(usable, blend.shares, strict=True)]
    rounding = math.fsum(abs(part.share) * _ROUNDOFF[part.snapshot.dtype] for part in parts)
    return Plan(
        step=step,
        origin=origin,
        newest=parts[-1],
        parts=tuple(part for part in parts if part.share),
        error=blend.error,
        amplification=blend.amplification,
        rounding=rounding,
        warning=_warning(blend, rounding),
    )


def _closest(usable: Sequence[_Stored], gamma: float) -> list[_Stored]:
    """Those of the averages whose exponents are closest to `gamma`, by ratio."""
    gammas = sorted({one.member.gamma for one in usable}, key=lambda each: abs(math.log((each + 1) / (gamma + 1))))
    return [one for one in usable if one.member.gamma in gammas[:PROFILES_MAX]]


def _warning(blend: Blend, rounding: float) -> str | None:
    said = []
    if blend.error > ERROR_TRUSTED:
        said.append(
            f"the profile is off by an estimated {blend.error:.1%}: the width is far from those of the run's averages, "
            "or the ring has too few snapshots"
        )
    if rounding > ROUNDING_TRUSTED:
        said.append(
            f"the stored weights' rounding is amplified {blend.amplification:.1f} times, to {rounding:.1%} of the "
            "largest of them at worst: keep them in float32 (--ring-dtype)"
        )
    return "; ".join(said) or None


def _useless(plan: Plan, snapshots: Sequence[RingSnapshot]) -> str:
    used = sorted({part.member.average for part in plan.parts})
    steps = [snapshot.step for snapshot in snapshots if snapshot.step <= plan.step]
    return (
        f"what can be made of {', '.join(used)} in {len(steps)} snapshots is off by an estimated {plan.error:.0%}: ask "
        "for a width closer to theirs, or for a step that has more snapshots before it; --ring-every-steps and "
        "--ring-size say how many there are"
    )


def _missing(step: int, steps: Sequence[int]) -> str:
    nearest = sorted({*[one for one in steps if one < step][-1:], *[one for one in steps if one > step][:1]})
    shown = " and of step ".join(map(str, nearest))
    return (
        f"the ring has no snapshot of step {step}: the nearest is of step {shown}, it has {len(steps)} from {steps[0]} "
        f"to {steps[-1]}"
    )
