"""The environment variables that any part of the project reads, and who must have meant one of them.

Comes in: names of variables. Goes out: those that look like one of ours misspelt, each with the one that was meant.
Reads no environment. All parts share the list: a variable for the trainer is no mistake where only a server runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Final

VARIABLES: Final = frozenset(
    {
        "EMA_CHUNK_BYTES",
        "EMA_DATA",
        "EMA_DEVICE",
        "EMA_ENDPOINT",
        "EMA_EVALUATE",
        "EMA_EVALUATE_DEVICE",
        "EMA_EVALUATE_EVERY_VERSIONS",
        "EMA_HTTP",
        "EMA_INSECURE",
        "EMA_KEEP_GENERATIONS",
        "EMA_KERNEL",
        "EMA_LOG_LEVEL",
        "EMA_LOST_AFTER_SECONDS",
        "EMA_PUBLISH_EVERY_SECONDS",
        "EMA_PUBLISH_EVERY_STEPS",
        "EMA_RING_DTYPE",
        "EMA_RING_EVERY_STEPS",
        "EMA_RING_SIZE",
        "EMA_RUN",
        "EMA_SAMPLES_PER_STEP",
        "EMA_STEPS_PER_EPOCH",
        "EMA_TOKEN",
        "EMA_URL",
        "EMA_ZMQ",
    }
)

_PREFIX = "EMA_"
_LIKENESS = 0.65  # EMA_URI is like EMA_URL, EMA_PUBLISH_SECONDS like EMA_PUBLISH_EVERY_SECONDS; EMA_DECAY like none


def misspelt(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names like those of `VARIABLES` that are none of them, each with the closest one, in alphabetical order.

    What merely begins with `EMA_` belongs to somebody else and is passed over.
    """
    ours = {name.removeprefix(_PREFIX): name for name in VARIABLES}
    for name in sorted(name for name in names if name.upper().startswith(_PREFIX) and name not in VARIABLES):
        closest = get_close_matches(name.upper().removeprefix(_PREFIX), ours, n=1, cutoff=_LIKENESS)
        if closest:
            yield name, ours[closest[0]]


def warning(name: str, meant: str) -> str:
    """What to say of a misspelt variable."""
    return f"the variable {name} is set, and nothing reads it: is {meant} meant?"
