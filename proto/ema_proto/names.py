"""Names of runs, averages and companion files, and patterns of tensor names.

A name is safe in a path, a URL and a Hugging Face repository id. Patterns are those of `fnmatch`, over whole canonical
names and case-sensitive: `*` is any text, dots included, `?` one character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from functools import lru_cache

from ema_proto.errors import SHOWN_CHARS, LocalProtocolError
from ema_proto.limits import FILE_NAME_CHARS_MAX, NAME_CHARS_MAX, PATTERNS_MAX, TENSOR_NAME_CHARS_MAX

# First path segments of the HTTP API and of the Hub protocol served beside it.
RESERVED = frozenset({"api", "v1", "ui", "docs", "metrics", "models", "datasets", "spaces"})

# Files that a server writes into the folder of a version.
OWN_FILES = frozenset(
    {
        "adapter_model.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "generation.json",
        "model.safetensors",
        "state.safetensors",
        "version.json",
    }
)

_ALLOWED = re.compile(r"[A-Za-z0-9_.-]+")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)  # of Windows


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


def is_name(kind: str, name: str) -> bool:
    """Whether `check_name` accepts the name."""
    try:
        check_name(kind, name)
    except LocalProtocolError:
        return False
    return True


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


def check_file_name(name: str) -> str:
    """Return `name` if it may name a companion file: `NAME` or `FOLDER/NAME`, safe on every file system.

    Raises:
        LocalProtocolError: it is not, or the server writes a file of this name itself.
    """
    problem = _file_problem(name)
    if problem:
        raise LocalProtocolError(
            f"file name {name[: FILE_NAME_CHARS_MAX + 1]!r} {problem}; use NAME or FOLDER/NAME, at most "
            f"{FILE_NAME_CHARS_MAX} characters in all, of A-Z a-z 0-9 _ . + = @ -"
        )
    return name


def _file_problem(name: str) -> str | None:
    parts = name.split("/")
    if not name:
        return "is empty"
    if len(name) > FILE_NAME_CHARS_MAX:
        return f"has {len(name)} characters"
    if len(parts) > 2:
        return "has more than one folder"
    for part in parts:
        if not _FILE.fullmatch(part):
            return "has a character that is not allowed" if part else "has an empty part"
        if part.endswith("."):
            return "has a part that ends in '.'"
        if _DEVICES.fullmatch(part):
            return f"has a part, {part!r}, that names a device on Windows"
    if parts[0].lower() in OWN_FILES:
        return "is that of a file which the server writes itself"
    return None


def is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `name` matches one of `include`, or that is empty, and none of `exclude`."""
    included = not include or _matcher(tuple(include)).match(name)
    return bool(included) and not (exclude and _matcher(tuple(exclude)).match(name))


def unmatched(patterns: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The patterns that match none of `names`."""
    return tuple(pattern for pattern in patterns if not any(map(_matcher((pattern,)).match, names)))


@lru_cache(maxsize=PATTERNS_MAX)
def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Matches what one of the patterns does. There may be hundreds of them, for 100,000 names."""
    return re.compile("|".join(map(translate, patterns)))


def check_patterns(what: str, value: object) -> tuple[str, ...]:
    """Return a list of patterns as a tuple; one may come as a plain string. `what` names them in the message.

    Raises:
        LocalProtocolError: it is not a list of strings, is too long, or holds a pattern that a spec cannot.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, tuple | list) or len(patterns) > PATTERNS_MAX:
        raise LocalProtocolError(f"{what} {str(value)[:SHOWN_CHARS]!r} is not a list of up to {PATTERNS_MAX} patterns")
    for pattern in patterns:
        if not isinstance(pattern, str) or not 0 < len(pattern) <= TENSOR_NAME_CHARS_MAX:
            problem = f"is not a text of 1 to {TENSOR_NAME_CHARS_MAX} characters"
        elif pattern != pattern.strip() or not pattern.isprintable() or "," in pattern or "|" in pattern:
            problem = "has a character that separates parameters: leave out , and | and blanks at its ends"
        else:
            continue
        raise LocalProtocolError(f"{what} pattern {str(pattern)[:SHOWN_CHARS]!r} {problem}; use for example head.*")
    return tuple(patterns)
