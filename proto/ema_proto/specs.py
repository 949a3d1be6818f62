"""Averaging rules as values and as strings: `Ema(0.9999)` is `ema:0.9999`, its default name `ema-0.9999`.

The arithmetic of each rule lives in the server; here is only what both ends, the files and the URLs must agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from ema_proto.errors import LocalProtocolError
from ema_proto.limits import AVERAGES_MAX
from ema_proto.names import check_name

_SHOWN_CHARS = 80
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Ema:
    """Exponential moving average: `average = decay * average + (1 - decay) * weights`, once for each step.

    Args:
        decay: share of the old average kept at each step, in [0, 1).
        name: name of the average; the default is `ema-{decay}`.

    Raises:
        LocalProtocolError: the decay is out of range or the name is not allowed.
    """

    decay: float
    name: str = ""

    def __post_init__(self) -> None:
        """Validate the decay and fill in the default name."""
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise LocalProtocolError(f"ema decay {self.decay!r} is not a number")
        if not 0.0 <= self.decay < 1.0:
            raise LocalProtocolError(f"ema decay {self.decay!r} is not in [0, 1): use for example 0.9999")
        object.__setattr__(self, "decay", float(self.decay) + 0.0)  # -0.0 becomes 0.0
        object.__setattr__(self, "name", check_name("average", self.name or f"ema-{_number(self.decay)}"))

    @property
    def spec(self) -> str:
        """The rule as a string, without the name."""
        return f"ema:{_number(self.decay)}"


@dataclass(frozen=True, slots=True)
class Raw:
    """The last weights as they were sent, to be evaluated beside the averages."""

    name: str = "raw"

    def __post_init__(self) -> None:
        """Validate the name."""
        object.__setattr__(self, "name", check_name("average", self.name or "raw"))

    @property
    def spec(self) -> str:
        """The rule as a string, without the name."""
        return "raw"


AverageSpec: TypeAlias = Ema | Raw


def parse_average(text: str, *, name: str = "") -> AverageSpec:
    """Read one rule from its string, e.g. `"ema:0.999"` or `"raw"`.

    Args:
        text: the rule.
        name: name of the average; empty for the default one.

    Raises:
        LocalProtocolError: the rule is unknown or its parameter is wrong; the text says which and what is allowed.
    """
    rule, colon, parameter = text.strip().partition(":")
    if rule == "raw" and not colon:
        return Raw(name=name)
    if rule == "ema" and colon:
        if not _DECIMAL.fullmatch(parameter.strip()):
            raise LocalProtocolError(
                f"ema decay {parameter[:_SHOWN_CHARS]!r} is not a number: use for example ema:0.9999"
            )
        return Ema(float(parameter), name=name)
    raise LocalProtocolError(f"unknown average {text[:_SHOWN_CHARS]!r}: use ema:DECAY (for example ema:0.9999) or raw")


def parse_averages(given: Iterable[AverageSpec | str]) -> tuple[AverageSpec, ...]:
    """Read a list of rules, strings or values, and check that their names differ.

    Raises:
        LocalProtocolError: the list is empty or too long, a rule is wrong, or two averages share a name.
    """
    if isinstance(given, str):
        given = given.split(",")
    averages = tuple(parse_average(item) if isinstance(item, str) else item for item in given)
    if not 0 < len(averages) <= AVERAGES_MAX:
        raise LocalProtocolError(f"a run has 1 to {AVERAGES_MAX} averages, {len(averages)} were given")
    seen: set[str] = set()
    for average in averages:
        if average.name.lower() in seen:
            raise LocalProtocolError(f"two averages are named {average.name!r}: give one of them another name=")
        seen.add(average.name.lower())
    return averages


def _number(value: float) -> str:
    """Shortest decimal text that reads back as `value`, never in exponent form (names and URLs carry it)."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
