"""The parameters of averaging rules: kinds of values, their text and checks, and a rule's spec and default name.

A rule is a frozen dataclass whose fields carry a `Kind` as metadata.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Hashable, Mapping
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast

from ema_proto.errors import SHOWN_CHARS, LocalProtocolError
from ema_proto.limits import NAME_CHARS_MAX, STEP_MAX
from ema_proto.names import check_name, check_patterns

Buffers: TypeAlias = Literal["average", "copy"]
Accumulator: TypeAlias = Literal["float32", "float64"]

_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Kind:
    """The values that a parameter may have; `what` names the parameter in messages (`"ema gamma"`).

    `checked` and `read` raise LocalProtocolError with the value and what is allowed.
    """

    __slots__ = ()

    def checked(self, what: str, value: Any) -> Any:
        """The canonical value."""
        raise NotImplementedError

    def read(self, what: str, text: str) -> Any:
        """The value that a text means."""
        return text

    def written(self, value: Any) -> str:
        """The text of a value."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A float in [`low`, `high`), which `range` says in words; `infinite` allows infinity, written `inf`."""

    range: str
    example: str
    low: float = 0.0
    high: float = math.inf
    infinite: bool = False

    def checked(self, what: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LocalProtocolError(f"{what} {str(value)[:SHOWN_CHARS]!r} is not a number: use {self.example}")
        is_high = value >= self.high and not (self.infinite and value == math.inf)
        if not value >= self.low or is_high or not (value == math.inf or value <= sys.float_info.max):
            raise LocalProtocolError(f"{what} {str(value)[:SHOWN_CHARS]} is not {self.range}: use {self.example}")
        return float(value) + 0.0  # -0.0 becomes 0.0

    def read(self, what: str, text: str) -> float:
        if text == "inf" and self.infinite:
            return math.inf
        if not _DECIMAL.fullmatch(text) or (self.infinite and math.isinf(float(text))):
            raise LocalProtocolError(f"{what} {text[:SHOWN_CHARS]!r} is not a number: use {self.example}")
        return float(text)

    def written(self, value: float) -> str:
        """Shortest decimal text that reads back as `value`, never in exponent form: names and URLs carry it."""
        if value == math.inf:
            return "inf"
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, slots=True)
class Count(Kind):
    """A whole number from `low` to `high`, of `unit`."""

    example: str
    low: int = 0
    high: int = STEP_MAX
    unit: str = "steps"

    def checked(self, what: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise self._wrong(what, value)
        return value

    def read(self, what: str, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,16}", text):
            raise self._wrong(what, text)
        return int(text)

    def _wrong(self, what: str, value: object) -> LocalProtocolError:
        shown = repr(value[:SHOWN_CHARS] if isinstance(value, str) else value)
        allowed = f"{self.low} or more" if self.high == STEP_MAX else f"{self.low} to {self.high}"
        return LocalProtocolError(f"{what} {shown} is not a number of {self.unit}, {allowed}: use {self.example}")


@dataclass(frozen=True, slots=True)
class Word(Kind):
    words: tuple[str, ...]

    def checked(self, what: str, value: object) -> str:
        if value not in self.words:
            allowed = " or ".join((", ".join(self.words[:-1]), self.words[-1]))
            raise LocalProtocolError(f"{what} {str(value)[:SHOWN_CHARS]!r} is unknown: use {allowed}")
        return str(value)


@dataclass(frozen=True, slots=True)
class Patterns(Kind):
    """A tuple of patterns of tensor names; as text joined by `|`."""

    def checked(self, what: str, value: object) -> tuple[str, ...]:
        return check_patterns(what, value)

    def read(self, what: str, text: str) -> tuple[str, ...]:
        return tuple(text.split("|"))

    def written(self, value: tuple[str, ...]) -> str:
        return "|".join(value)


def of_kind(kind: Kind, key: str = "") -> Mapping[str, Any]:
    """The metadata of a field that is a parameter; `key` where its name in a spec differs from the field's."""
    return {"kind": kind, "key": key}


BUFFERS = of_kind(Word(("average", "copy")))


class Rule(Hashable, Protocol):
    """A rule as this module needs it. `KEYWORD` begins its spec; `LEADING` is the field without a key."""

    KEYWORD: ClassVar[str]
    LEADING: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """The parameters of every averaging rule: which tensors it averages, and how precisely.

    Args:
        buffers: `"average"` treats float buffers (statistics of batch norm) like weights, `"copy"` takes their newest
            value.
        include: patterns of the tensors that are averaged, all of them where it is empty; the rest is copied.
        exclude: patterns of the tensors that are copied although `include` matches.
        accumulator: `"float32"`, or `"float64"`, which decays above 0.99999 need and which takes twice the memory.
    """

    buffers: Buffers = field(default="average", metadata=BUFFERS)
    include: tuple[str, ...] = field(default=(), metadata=of_kind(Patterns()))
    exclude: tuple[str, ...] = field(default=(), metadata=of_kind(Patterns()))
    accumulator: Accumulator = field(default="float32", metadata=of_kind(Word(("float32", "float64")), "acc"))

    def __post_init__(self) -> None:
        rule = cast(Rule, self)  # a subclass, which has a keyword and a name
        for key, parameter in parameters_of(rule).items():
            value = getattr(rule, parameter.name)
            if value is not None or parameter.default is not None:
                checked = parameter.metadata["kind"].checked(f"{rule.KEYWORD} {key}", value)
                object.__setattr__(self, parameter.name, checked)
        self.check_together()
        object.__setattr__(self, "name", check_name("average", rule.name) if rule.name else _default_name(rule.spec))

    @property
    def spec(self: Rule) -> str:
        """The rule as a string, without the name: what differs from the defaults, in a fixed order."""
        return _spec_of(self)

    def check_together(self) -> None:
        """Refuse combinations of parameters; most rules allow all."""


def parameters_of(rule: Rule | type[Rule]) -> dict[str, Field[Any]]:
    """The parameters by their key, in the order of a spec: the rule's own, then those that all rules have."""
    common = {shared.name for shared in fields(Treatment)}
    ours = [each for each in fields(rule) if "kind" in each.metadata]
    ordered = [each for each in ours if each.name not in common] + [each for each in ours if each.name in common]
    return {str(each.metadata["key"] or each.name): each for each in ordered}


@lru_cache(maxsize=1024)  # a status shows it after every snapshot
def _spec_of(rule: Rule) -> str:
    parts: list[str] = []
    for key, parameter in parameters_of(rule).items():
        value = getattr(rule, parameter.name)
        if value != parameter.default:
            text = parameter.metadata["kind"].written(value)
            parts.append(text if parameter.name == rule.LEADING else f"{key}={text}")
    return f"{rule.KEYWORD}:{','.join(parts)}" if parts else rule.KEYWORD


def _default_name(spec: str) -> str:
    """`swa:start=1000` is named `swa-start-1000`."""
    name = re.sub(r"[:,=]", "-", spec.replace(":sigma_rel=", ":"))
    shown = f"average {spec[:SHOWN_CHARS]!r}"
    if len(name) > NAME_CHARS_MAX:
        raise LocalProtocolError(
            f"the default name of {shown} has {len(name)} characters, more than the {NAME_CHARS_MAX} of a name: "
            "give it one with name="
        )
    try:
        return check_name("average", name)
    except LocalProtocolError:
        raise LocalProtocolError(
            f"{shown} makes no name, since a name holds no patterns and does not end in '.' or '-': "
            "give it one with name="
        ) from None
