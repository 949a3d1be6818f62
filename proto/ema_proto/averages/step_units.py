"""What an optimizer step is in samples and epochs, for rules that are given in these units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ema_proto.averages.rules import AverageSpec, Ema
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import QUANTITY_MAX, QUANTITY_MIN


@dataclass(frozen=True, slots=True)
class StepUnits:
    """The samples in an optimizer step, over all ranks, and the steps in an epoch; None where unknown.

    Raises:
        LocalProtocolError: one of them is not a number in [1e-9, 1e15).
    """

    samples_per_step: float | None = None
    steps_per_epoch: float | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_step", "steps_per_epoch"):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not QUANTITY_MIN <= value < QUANTITY_MAX:
                raise LocalProtocolError(
                    f"{name} {value!r} is not a number of at least 1e-9 and below 1e15: say how many"
                )
            object.__setattr__(self, name, float(value))

    def updated(self, newer: StepUnits) -> StepUnits:
        """These units with the fields that `newer` sets."""
        samples = self.samples_per_step if newer.samples_per_step is None else newer.samples_per_step
        return StepUnits(samples, self.steps_per_epoch if newer.steps_per_epoch is None else newer.steps_per_epoch)


UNKNOWN = StepUnits()


def needed_of(rule: AverageSpec) -> str | None:
    """The field of `StepUnits` that the rule needs; None if it needs none."""
    if not isinstance(rule, Ema):
        return None
    if rule.half_life_samples is not None:
        return "samples_per_step"
    return "steps_per_epoch" if rule.half_life_epochs is not None else None


def half_life_steps(rule: Ema, units: StepUnits) -> float:
    """The half-life of the rule in steps.

    Raises:
        ValueError: the rule has no half-life, or one in a unit that is not known.
    """
    if rule.half_life is not None:
        return rule.half_life
    if rule.half_life_samples is not None and units.samples_per_step is not None:
        return rule.half_life_samples / units.samples_per_step
    if rule.half_life_epochs is not None and units.steps_per_epoch is not None:
        return rule.half_life_epochs * units.steps_per_epoch
    raise ValueError(f"average {rule.name!r} ({rule.spec}) has no half-life in steps without {needed_of(rule)}")


def check_step_units(rules: Iterable[AverageSpec], units: StepUnits) -> None:
    """Refuse rules in a unit that is not known.

    Raises:
        LocalProtocolError: the text names the rule, what is missing and what to do.
    """
    for rule in rules:
        needed = needed_of(rule)
        if needed is not None and getattr(units, needed) is None:
            raise LocalProtocolError(
                f"average {rule.name!r} ({rule.spec}) needs to know {needed.replace('_', ' ')}: "
                f"pass {needed}= to EmaClient, or give its half-life in steps (ema:half_life=5000)"
            )
