"""Names of runs and averages: safe in a path, a URL and a Hugging Face repository id."""

from __future__ import annotations

import re

from ema_proto.errors import LocalProtocolError
from ema_proto.limits import NAME_CHARS_MAX

# First path segments of the HTTP API and of the Hub protocol served beside it.
RESERVED = frozenset({"api", "v1", "ui", "docs", "metrics", "models", "datasets", "spaces"})

_ALLOWED = re.compile(r"[A-Za-z0-9_.-]+")


def check_name(kind: str, name: str) -> str:
    """Return `name` if it may name a run or an average.

    Args:
        kind: what is named, for the message (`"run"`, `"average"`).
        name: the candidate.

    Raises:
        LocalProtocolError: the name is empty, too long, reserved, or not safe in a path and a URL.
    """
    problem = _problem(name)
    if problem:
        raise LocalProtocolError(
            f"{kind} name {name[: NAME_CHARS_MAX + 1]!r} {problem}; use 1 to {NAME_CHARS_MAX} of A-Z a-z 0-9 _ . -"
        )
    return name


def _problem(name: str) -> str | None:
    if not name:
        return "is empty"
    if len(name) > NAME_CHARS_MAX:
        return f"has {len(name)} characters"
    if not _ALLOWED.fullmatch(name):
        return "has a character that is not allowed"
    if name[0] in "-." or name[-1] in "-.":
        return "starts or ends in '-' or '.'"
    if "--" in name or ".." in name:
        return "contains '--' or '..'"
    if name.lower() in RESERVED:
        return "is reserved"
    return None
