"""JSON bodies: a dict to bytes, untrusted bytes to a dict, and the kinds of values that a message's fields may have.

Refused besides what is not JSON: NaN and infinities, a key given twice (two readers could see two values), and lone
surrogates (text that cannot be written to a log or a file).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, NoReturn, Self, get_type_hints

from ema_proto.errors import SHOWN_CHARS, RejectCode, RemoteProtocolError
from ema_proto.limits import QUANTITY_MAX, QUANTITY_MIN, TEXT_CHARS_MAX

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def encode_body(values: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON object: ASCII, no blanks."""
    return _ENCODER.encode(values).encode()


def decode_body(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        RemoteProtocolError: `bad_message`; not UTF-8, not JSON, nested beyond the parser's stack, or not an object.
    """
    try:
        text = body.decode()
        value = _DECODER.decode(text)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "the body is nested too deeply") from None
    except ValueError as error:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "the body is not a JSON object")
    return value


def shown(value: object) -> str:
    """A decoded value for an error text: short and printable; nested values are only counted."""
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return json.dumps(value)[:SHOWN_CHARS]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return value


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that a field may have.

    Args:
        read: a decoded JSON value (None if missing) to the field's value; raises ValueError where it is not allowed.
        write: the field's value to a JSON value.
        key: the key in the body, if it differs from the field's name.
        omit_none: leave the key out of the body where the field is None.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value
    key: str = ""
    omit_none: bool = False


HEADER: Final = "header"
"""Marks a field that travels in the header instead of the body."""


def where(is_allowed: Callable[[Any], bool], *, key: str = "") -> Kind:
    """JSON values that a predicate allows, as they are."""

    def read(value: Any) -> Any:
        if not is_allowed(value):
            raise ValueError(value)
        return value

    return Kind(read, key=key)


def integer(low: int, high: int, *, key: str = "") -> Kind:
    """An integer in [low, high]; booleans are no integers."""
    return where(lambda value: type(value) is int and low <= value <= high, key=key)


def text(chars_max: int) -> Kind:
    """A string of at most `chars_max` characters."""
    return where(lambda value: isinstance(value, str) and len(value) <= chars_max)


def optional(kind: Kind, *, omit_none: bool = False) -> Kind:
    """A value of `kind`, or None for null or missing."""
    return Kind(
        lambda value: None if value is None else kind.read(value),
        lambda value: None if value is None else kind.write(value),
        omit_none=omit_none,
    )


def list_of(kind: Kind, length_max: int) -> Kind:
    """A tuple of at most `length_max` values of `kind`."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > length_max:
            raise ValueError(value)
        return tuple(kind.read(item) for item in value)

    return Kind(read, lambda values: [kind.write(item) for item in values])


def choice(*options: str) -> Kind:
    def read(value: Any) -> str:
        for option in options:
            if value == option:
                return option
        raise ValueError(value)

    return Kind(read)


FLAG: Final = where(lambda value: type(value) is bool)
QUANTITY: Final = Kind(
    lambda value: float(where(lambda v: type(v) in (int, float) and QUANTITY_MIN <= v < QUANTITY_MAX).read(value)),
    float,
)
# A text for people, cut to its bound; surrogates, as in undecodable paths, are replaced.
MESSAGE_TEXT: Final = Kind(
    text(TEXT_CHARS_MAX).read, lambda value: value[:TEXT_CHARS_MAX].encode(errors="replace").decode()
)


class WithBody:
    """A dataclass whose fields are annotated with their `Kind` or with `HEADER`; the body has the fields' order."""

    __slots__ = ()
    type: ClassVar[int]

    def body(self) -> dict[str, Any]:
        """The message's JSON body."""
        return {
            kind.key or name: kind.write(getattr(self, name))
            for name, kind in _layout_of(self.__class__).body.items()
            if not (kind.omit_none and getattr(self, name) is None)
        }

    def header(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _layout_of(self.__class__).header}

    @classmethod
    def read(cls, body: Mapping[str, Any], header: Mapping[str, int]) -> Self:
        """The message of a decoded body and the fields of its header. Unknown keys are ignored.

        Raises:
            RemoteProtocolError: `bad_message` names the field with a wrong value; averages and manifests have codes of
                their own.
        """
        values: dict[str, Any] = {name: header[name] for name in _layout_of(cls).header}
        for name, kind in _layout_of(cls).body.items():
            key = kind.key or name
            try:
                values[name] = kind.read(body.get(key))
            except ValueError:
                found = shown(body[key]) if key in body else "missing"
                message = f"{cls.__name__.upper()}: field {key!r} is {found}"
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, message) from None
        return cls(**values)


@dataclass(frozen=True, slots=True)
class _Layout:
    header: tuple[str, ...]
    body: dict[str, Kind]


_LAYOUTS: dict[type, _Layout] = {}


def _layout_of(message: type) -> _Layout:
    """Which fields of a message class are where; reading the annotations takes long enough to do it once."""
    if message not in _LAYOUTS:
        hints = get_type_hints(message, include_extras=True)
        marks = {each.name: getattr(hints[each.name], "__metadata__", (None,))[0] for each in fields(message)}
        _LAYOUTS[message] = _Layout(
            header=tuple(name for name, mark in marks.items() if mark == HEADER),
            body={name: mark for name, mark in marks.items() if isinstance(mark, Kind)},
        )
    return _LAYOUTS[message]
