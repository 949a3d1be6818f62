"""Finds environment variables that look like misspelt ones of this project. Reads no environment itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from difflib import SequenceMatcher, get_close_matches

_PREFIX = "EMA_"
_SIMILARITY = 0.65  # EMA_URI is like EMA_URL, EMA_PUBLISH_SECONDS like EMA_PUBLISH_EVERY_SECONDS; EMA_DECAY like none
_NEARLY = 0.06  # a second name this close to the best one is suggested too


def misspelt(names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    """A warning for each of `names` that is similar to a known variable and not one itself, in alphabetical order.

    Other variables that begin with `EMA_` belong to other programs and are ignored.

    Args:
        names: the variables that are set.
        known: the variables that the caller reads.
    """
    suffixes = [name.removeprefix(_PREFIX) for name in known]
    for name in sorted(name for name in names if name.upper().startswith(_PREFIX) and name not in known):
        wrong = name.upper().removeprefix(_PREFIX)
        closest = get_close_matches(wrong, suffixes, n=2, cutoff=_SIMILARITY)
        alike = [SequenceMatcher(None, each, wrong).ratio() for each in closest]
        meant = [_PREFIX + each for each, ratio in zip(closest, alike, strict=True) if ratio > alike[0] - _NEARLY]
        if meant:
            yield f"the variable {name} is set, but nothing reads it: did you mean {' or '.join(meant)}?"
