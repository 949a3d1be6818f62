"""The weight of each checkpoint in an average.

Checkpoints are snapshots with gaps between them: each stands for the steps since the one before it, and the oldest for
all steps up to its own, as in a run on a server whose origin is 0. Without `every`, `swa` and `window` count
checkpoints instead, each once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ema_proto.averages.rules import AverageSpec, Bema, Raw, Uniform, Window
from ema_proto.averages.step_units import needed_of
from ema_server.checkpoints.errors import ArgumentError
from ema_server.rules.weights import Span, points, weight_of
from ema_server.rules.window import Entries, blends, entered

ORIGIN = 0  # no step had been taken when the run began


@dataclass(frozen=True, slots=True)
class Weighing:
    """How one average weighs checkpoints.

    Args:
        rule: says which tensors are averaged, and how precisely.
        spec: the rule, or `weights:...`, as text.
        steps: of the checkpoints, increasing.
        weights: of each checkpoint in the average of it and the ones before it. None replaces what was there before,
            and 0 leaves it unchanged. Exactly one is None, and those before it are 0.
    """

    rule: AverageSpec
    spec: str
    steps: tuple[int, ...]
    weights: tuple[float | None, ...]

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def newest(self) -> int:
        """Number of the checkpoint that tensors which are not averaged are copied from."""
        return max(number for number, weight in enumerate(self.weights) if weight != 0.0)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each checkpoint in the average; they add up to 1."""
        left, shares = 1.0, list[float]()
        for weight in reversed(self.weights):
            taken = 1.0 if weight is None else weight
            shares.append(left * taken)
            left *= 1.0 - taken
        return tuple(reversed(shares))


def weigh(rule: AverageSpec, steps: Sequence[int]) -> Weighing:
    """How a rule weighs the checkpoints of these steps, which increase.

    Raises:
        ArgumentError: the rule's length is given in samples or epochs, which steps do not tell, or it is a `bema`.
    """
    if isinstance(rule, Bema):
        raise ArgumentError(f"{rule.spec} is no mean, since its correction has negative weights: it needs a server")
    needed = needed_of(rule)
    if needed is not None:
        raise ArgumentError(
            f"{rule.spec} needs to know {needed.replace('_', ' ')}, which checkpoints do not say: give the half-life "
            "in steps (ema:half_life=5000)"
        )
    return Weighing(rule, rule.spec, tuple(steps), _trimmed(_weights(rule, steps)))


def weigh_by(numbers: Sequence[float], steps: Sequence[int]) -> Weighing:
    """A mean of checkpoints with the given weights, which are divided by their sum.

    Raises:
        ArgumentError: there is another number of weights, one is negative or not finite, or all are 0.
    """
    if len(numbers) != len(steps):
        raise ArgumentError(f"--weights has {len(numbers)} numbers for {len(steps)} checkpoints: give one for each")
    for number in numbers:
        if not (math.isfinite(number) and number >= 0.0):
            raise ArgumentError(f"--weights has {number:g}: give finite numbers that are not negative")
    total, weights = 0.0, list[float | None]()
    for number in numbers:
        total += number
        weights.append(None if number == total else number / total)
    if not 0.0 < total < math.inf:
        raise ArgumentError(f"the numbers of --weights add up to {total:g}: give at least one above 0")
    spec = f"weights:{','.join(format(number, 'g') for number in numbers)}"
    return Weighing(Uniform(name="weights"), spec, tuple(steps), _trimmed(weights))


def _weights(rule: AverageSpec, steps: Sequence[int]) -> list[float | None]:
    if isinstance(rule, Raw):
        return [None] * len(steps)
    if isinstance(rule, Window):
        return _window(rule, steps)
    if isinstance(rule, Uniform) and rule.every == 1:
        return _counted(rule, steps)
    spans = (Span(before, step, ORIGIN) for before, step in pairwise(steps))
    return [None, *(weight_of(rule, span) for span in spans)]


def _counted(rule: Uniform, steps: Sequence[int]) -> list[float | None]:
    """The plain mean of the checkpoints from `start` on. Before the first of them it follows the checkpoints."""
    earlier = sum(step < rule.start for step in steps)
    return [None if number <= earlier else 1 / (number - earlier + 1) for number in range(len(steps))]


def _window(rule: Window, steps: Sequence[int]) -> list[float | None]:
    entries: Entries = ()
    for before, step in pairwise((ORIGIN, *steps)):
        due = 1 if rule.every == 1 else points(rule.every, before, step)
        entries = entered(entries, rule.k, step, due)
    if not entries:
        return [None] * len(steps)
    first, *others = zip((entry.step for entry in entries), blends(entries), strict=True)
    weights: dict[int, float | None] = {first[0]: None, **dict(others)}
    return [weights.get(step, 0.0) for step in steps]


def _trimmed(weights: Sequence[float | None]) -> tuple[float | None, ...]:
    """The weights with 0 before the last that replaces."""
    begins = max(number for number, weight in enumerate(weights) if weight is None)
    return tuple(weight if number >= begins else 0.0 for number, weight in enumerate(weights))
