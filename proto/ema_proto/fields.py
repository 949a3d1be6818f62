"""Reading the fields of a JSON body that a stranger wrote. Every wrong value is a `bad_message` naming the field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ema_proto.errors import RejectCode, RemoteProtocolError

_Choice = TypeVar("_Choice", bound=str)
_SHOWN_CHARS = 80


def parse_json(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        RemoteProtocolError: `bad_message`; not UTF-8, not JSON, nested beyond the parser's stack, or not an object.
    """
    try:
        value = json.loads(body.decode())
    except RecursionError:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "the body is nested too deeply") from None
    except ValueError as error:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "the body is not a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class Fields:
    """A decoded body and the message it belongs to."""

    message: str
    values: dict[str, Any]

    def bad(self, key: str) -> RemoteProtocolError:
        """The error for a field with a wrong value."""
        shown = json.dumps(self.values.get(key))[:_SHOWN_CHARS]
        return RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{self.message}: field {key!r} is {shown}")

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
