"""Averaging rules as values and as strings: `Ema(0.9999)` is `ema:0.9999`, its default name `ema-0.9999`.

The arithmetic of each rule lives in the server; here is only what both ends, the files and the URLs must agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from typing import Literal, TypeAlias

from ema_proto.errors import LocalProtocolError
from ema_proto.limits import AVERAGES_MAX, NAME_CHARS_MAX, STEP_MAX
from ema_proto.names import check_name

_SHOWN_CHARS = 80
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PARAMETER = re.compile(r"\s*[a-z_]+\s*=")
_EXAMPLE = "for example ema:0.9999,warmup=timm"
_GAMMA, _POWER = 1.0, 2 / 3


@dataclass(frozen=True, slots=True)
class Ema:
    """Exponential moving average: `average = d * average + (1 - d) * weights`, once for each step.

    `d` is `decay` unless `warmup` or `update_after` is given; then it is that of timm's ModelEmaV3. At the t-th step
    since the run began, let `s = t - update_after - 1`: up to `s = 0` the average is a copy of the weights, and with
    `warmup="timm"`, `d = max(min(1 - (1 + s / gamma) ** -power, decay), min_decay)` from then on.

    Args:
        decay: share of the old average kept at each step, in [0, 1).
        name: name of the average; the default is made of the parameters, `ema-{decay}`.
        warmup: `"timm"`, or None for a constant decay.
        gamma: of the warm-up, above 0: how many steps it stretches over.
        power: of the warm-up, above 0: 1 is a plain mean, 2/3 suits a million steps, 3/4 fewer.
        min_decay: of the warm-up, in [0, 1): the decay is never below it.
        update_after: the average is a copy of the weights for so many steps, and one more.
        buffers: `"average"` treats float buffers (statistics of batch norm) like weights, `"copy"` takes their newest
            value.

    Raises:
        LocalProtocolError: a parameter is out of range or the name is not allowed.
    """

    decay: float
    name: str = ""
    _: KW_ONLY
    warmup: Literal["timm"] | None = None
    gamma: float = _GAMMA
    power: float = _POWER
    min_decay: float = 0.0
    update_after: int = 0
    buffers: Literal["average", "copy"] = "average"

    def __post_init__(self) -> None:
        """Validate the parameters and fill in the default name."""
        object.__setattr__(self, "decay", _share("decay", self.decay, "use for example 0.9999"))
        object.__setattr__(self, "min_decay", _share("min", self.min_decay, _EXAMPLE))
        object.__setattr__(self, "gamma", _positive("gamma", self.gamma))
        object.__setattr__(self, "power", _positive("power", self.power))
        if self.warmup not in (None, "timm"):
            raise LocalProtocolError(f"ema warmup {self.warmup!r} is unknown: use timm, {_EXAMPLE}")
        if self.buffers not in ("average", "copy"):
            raise LocalProtocolError(f"ema buffers {self.buffers!r} is unknown: use average or copy")
        _check_steps(self.update_after)
        if self.warmup is None and (self.gamma, self.power, self.min_decay) != (_GAMMA, _POWER, 0.0):
            raise LocalProtocolError(f"ema gamma, power and min belong to a warm-up: add warmup=timm, {_EXAMPLE}")
        object.__setattr__(self, "name", check_name("average", self.name or _default_name(self.spec)))

    @property
    def spec(self) -> str:
        """The rule as a string, without the name: what differs from the defaults, in this order."""
        parts = [f"ema:{_number(self.decay)}"]
        parts += ["warmup=timm"] if self.warmup is not None else []
        parts += [f"gamma={_number(self.gamma)}"] if self.gamma != _GAMMA else []
        parts += [f"power={_number(self.power)}"] if self.power != _POWER else []
        parts += [f"min={_number(self.min_decay)}"] if self.min_decay != 0.0 else []
        parts += [f"update_after={self.update_after}"] if self.update_after != 0 else []
        parts += [f"buffers={self.buffers}"] if self.buffers != "average" else []
        return ",".join(parts)


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
    """Read one rule from its string, e.g. `"ema:0.999"`, `"ema:0.9999,warmup=timm"` or `"raw"`.

    Args:
        text: the rule.
        name: name of the average; empty for the default one.

    Raises:
        LocalProtocolError: the rule is unknown or its parameter is wrong; the text says which and what is allowed.
    """
    rule, colon, parameters = text.strip().partition(":")
    if rule == "raw" and not colon:
        return Raw(name=name)
    if rule != "ema" or not colon:
        raise LocalProtocolError(
            f"unknown average {text[:_SHOWN_CHARS]!r}: use ema:DECAY (for example ema:0.9999) or raw"
        )
    decay, *others = parameters.split(",")
    given = _parameters(others)
    return Ema(
        _decimal("decay", decay),
        name=name,
        warmup=given.get("warmup"),  # type: ignore[arg-type]  # Ema refuses what is not allowed
        gamma=_decimal("gamma", given.get("gamma", repr(_GAMMA))),
        power=_decimal("power", given.get("power", repr(_POWER))),
        min_decay=_decimal("min", given.get("min", "0")),
        update_after=_steps(given.get("update_after", "0")),
        buffers=given.get("buffers", "average"),  # type: ignore[arg-type]
    )


def split_averages(text: str) -> list[str]:
    """The rules in a text like `"ema:0.9999,warmup=timm,raw"`: a comma separates rules, and a rule's parameters."""
    rules: list[str] = []
    for part in text.split(","):
        if rules and _PARAMETER.match(part):
            rules[-1] += f",{part}"
        else:
            rules.append(part)
    return rules


def parse_averages(given: Iterable[AverageSpec | str]) -> tuple[AverageSpec, ...]:
    """Read a list of rules, strings or values, and check that their names differ.

    Raises:
        LocalProtocolError: the list is empty or too long, a rule is wrong, or two averages share a name.
    """
    if isinstance(given, str):
        given = split_averages(given)
    averages = tuple(parse_average(item) if isinstance(item, str) else item for item in given)
    if not 0 < len(averages) <= AVERAGES_MAX:
        raise LocalProtocolError(f"a run has 1 to {AVERAGES_MAX} averages, {len(averages)} were given")
    seen: set[str] = set()
    for average in averages:
        if average.name.lower() in seen:
            raise LocalProtocolError(f"two averages are named {average.name!r}: give one of them another name=")
        seen.add(average.name.lower())
    return averages


def _default_name(spec: str) -> str:
    name = re.sub(r"[:,=]", "-", spec)
    if len(name) > NAME_CHARS_MAX:
        raise LocalProtocolError(
            f"the default name of average {spec[:_SHOWN_CHARS]!r} has {len(name)} characters, more than the "
            f"{NAME_CHARS_MAX} of a name: give it one with name="
        )
    return name


def _parameters(parts: list[str]) -> dict[str, str]:
    """`key=value` parts by key."""
    known = ("warmup", "gamma", "power", "min", "update_after", "buffers")
    given: dict[str, str] = {}
    for part in parts:
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known or key in given:
            problem = "is given twice" if key in given else "is unknown"
            raise LocalProtocolError(
                f"ema parameter {part[:_SHOWN_CHARS]!r} {problem}: use {', '.join(known)}, {_EXAMPLE}"
            )
        given[key] = value
    return given


def _decimal(what: str, text: str) -> float:
    if not _DECIMAL.fullmatch(text.strip()):
        example = "ema:0.9999" if what == "decay" else f"ema:0.9999,warmup=timm,{what}=0.5"
        raise LocalProtocolError(f"ema {what} {text[:_SHOWN_CHARS]!r} is not a number: use for example {example}")
    return float(text)


def _check_steps(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= STEP_MAX:
        raise LocalProtocolError(f"ema update_after {value!r} is not a number of steps, 0 or more")


def _steps(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,16}", text):
        raise LocalProtocolError(
            f"ema update_after {text[:_SHOWN_CHARS]!r} is not a number of steps: "
            "use for example ema:0.9999,update_after=100"
        )
    return int(text)


def _share(what: str, value: object, advice: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LocalProtocolError(f"ema {what} {value!r} is not a number")
    if not 0.0 <= value < 1.0:
        raise LocalProtocolError(f"ema {what} {value!r} is not in [0, 1): {advice}")
    return float(value) + 0.0  # -0.0 becomes 0.0


def _positive(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LocalProtocolError(f"ema {what} {value!r} is not a number")
    if not 0.0 < value < float("inf"):
        raise LocalProtocolError(f"ema {what} {value!r} is not a number above 0: {_EXAMPLE}")
    return float(value)


def _number(value: float) -> str:
    """Shortest decimal text that reads back as `value`, never in exponent form (names and URLs carry it)."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
