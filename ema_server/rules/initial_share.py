"""Whether an average still consists to a notable part of the weights that it began with."""

from __future__ import annotations

NOTABLE_SHARE = 0.1


def initial_share_warning(share: float) -> str | None:
    """What to tell a user of an average of which `share` is the weights that it began with; None if that is little.

    The average began with the first snapshot that it copied, with the last `set`, or with `init=start` before the first
    step. A share of 1 is no reason for a warning: the average has copied the newest snapshot, and averages from now on.
    """
    if share <= NOTABLE_SHARE or share >= 1.0:
        return None
    return (
        f"{share:.0%} of it is still the weights that it began with, so it is too long for the steps since then: "
        "use a shorter average, or warmup=half_life"
    )
