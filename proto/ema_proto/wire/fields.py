"""Reading the fields of a message that a stranger wrote. Every wrong value is a `bad_message` naming the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import (
    CAPABILITIES_MAX,
    CAPABILITY_CHARS_MAX,
    QUANTITY_MAX,
    QUANTITY_MIN,
    STEP_MAX,
    TEXT_CHARS_MAX,
)
from ema_proto.wire.bodies import shown

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True, slots=True)
class Fields:
    """A decoded body, the message it belongs to, and what the message reads from its header."""

    message: str
    values: dict[str, Any]
    step: int = 0
    attempt: int = 0
    epoch: int = 0

    def bad(self, key: str) -> RemoteProtocolError:
        """The error for a field with a wrong value."""
        found = shown(self.values[key]) if key in self.values else "missing"
        return RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{self.message}: field {key!r} is {found}")

    def value(self, key: str) -> Any:
        """Whatever is there, None when missing."""
        return self.values.get(key)

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in [low, high]; booleans are no integers."""
        value = self.values.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key)
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or None when null or missing."""
        return None if self.values.get(key) is None else self.integer(key, low, high)

    def integers(self, key: str, length_max: int, high: int) -> tuple[int, ...]:
        """A list of at most `length_max` integers in [0, high]."""
        items = self.items(key, length_max)
        if not all(type(item) is int and 0 <= item <= high for item in items):
            raise self.bad(key)
        return tuple(items)

    def optional_step(self, key: str) -> int | None:
        """A step, or None when null or missing."""
        return self.optional_integer(key, 0, STEP_MAX)

    def optional_quantity(self, key: str) -> float | None:
        """A number in [1e-9, 1e15), or None when null or missing."""
        value = self.values.get(key)
        if value is not None and (type(value) not in (int, float) or not QUANTITY_MIN <= value < QUANTITY_MAX):
            raise self.bad(key)
        return None if value is None else float(value)

    def request(self) -> int:
        """The number of a request."""
        return self.integer("request", 0, STEP_MAX)

    def optional_error(self) -> str | None:
        """Why a request failed, or None when it did not."""
        return self.optional_text("error", TEXT_CHARS_MAX)

    def capabilities(self) -> tuple[str, ...]:
        """What the other side says it can do; names that this side does not know mean nothing to it."""
        items = self.items("capabilities", CAPABILITIES_MAX)
        if not all(isinstance(item, str) and len(item) <= CAPABILITY_CHARS_MAX for item in items):
            raise self.bad("capabilities")
        return tuple(items)

    def flag(self, key: str) -> bool:
        """A boolean."""
        value = self.values.get(key)
        if type(value) is not bool:
            raise self.bad(key)
        return value

    def text(self, key: str, chars_max: int) -> str:
        """A string of at most `chars_max` characters."""
        value = self.values.get(key)
        if not isinstance(value, str) or len(value) > chars_max:
            raise self.bad(key)
        return value

    def optional_text(self, key: str, chars_max: int) -> str | None:
        """A string, or None when null or missing."""
        return None if self.values.get(key) is None else self.text(key, chars_max)

    def choice(self, key: str, allowed: Sequence[_Choice]) -> _Choice:
        """One of `allowed`."""
        value = self.values.get(key)
        for option in allowed:
            if value == option:
                return option
        raise self.bad(key)

    def items(self, key: str, length_max: int) -> list[Any]:
        """A list of at most `length_max` items."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > length_max:
            raise self.bad(key)
        return value
