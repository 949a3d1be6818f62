"""JSON bodies: a dict to bytes, and a stranger's bytes to a dict. What JSON leaves open is closed here, once.

Refused besides what is no JSON: NaN and infinities, a key given twice (two readers could see two values), and lone
surrogates (text that cannot be written to a log or a file).
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ema_proto.errors import RejectCode, RemoteProtocolError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN_CHARS = 80


def encode_body(values: dict[str, Any]) -> bytes:
    """The bytes of a JSON object: ASCII, no blanks."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def decode_body(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        RemoteProtocolError: `bad_message`; not UTF-8, not JSON, nested beyond the parser's stack, or not an object.
    """
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
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
    """A decoded value for an error text: short, printable, and never walking into what may be nested deeply."""
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return json.dumps(value)[:_SHOWN_CHARS]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return value
