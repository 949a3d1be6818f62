"""Which tensors a list of patterns means. A canonical tensor name and the patterns come in, yes or no goes out.

Patterns are those of `fnmatch`, over whole names and case by case: `*` is any text, dots included, `?` one character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ema_proto.errors import LocalProtocolError
from ema_proto.limits import PATTERNS_MAX, TENSOR_NAME_CHARS_MAX

_SHOWN_CHARS = 80


def is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `name` matches one of `include`, or that is empty, and none of `exclude`."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)


def unmatched(patterns: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The patterns that match none of `names`."""
    return tuple(pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names))


def check_patterns(what: str, value: object) -> tuple[str, ...]:
    """Return a list of patterns as a tuple; one pattern may come as a plain string.

    Args:
        what: whose they are, for the message (`"ema include"`).
        value: the candidate.

    Raises:
        LocalProtocolError: it is no list of texts, too long, or a pattern could not be written into a spec.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, tuple | list) or len(patterns) > PATTERNS_MAX:
        raise LocalProtocolError(f"{what} {str(value)[:_SHOWN_CHARS]!r} is not a list of up to {PATTERNS_MAX} patterns")
    for pattern in patterns:
        if not isinstance(pattern, str) or not 0 < len(pattern) <= TENSOR_NAME_CHARS_MAX:
            problem = f"is not a text of 1 to {TENSOR_NAME_CHARS_MAX} characters"
        elif pattern != pattern.strip() or not pattern.isprintable() or "," in pattern or "|" in pattern:
            problem = "has a character that separates parameters: leave out , and | and blanks at its ends"
        else:
            continue
        raise LocalProtocolError(f"{what} pattern {str(pattern)[:_SHOWN_CHARS]!r} {problem}; use for example head.*")
    return tuple(patterns)
