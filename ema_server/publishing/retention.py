"""Which generations of a run, and which snapshots of its ring, are deleted. Pure functions.

Besides the newest generations some older ones stay, the first among them, for a trainer that resumes from a checkpoint
that the server does not know of. The farther back it goes, the larger the gap to the generation before it may be.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_server.storage.catalog import Generation

KEEP_PINNED = 10  # `checkpoint` makes these, to go with the trainer's own checkpoints


def expired(generations: Sequence[Generation], keep: int) -> tuple[Generation, ...]:
    """All but the newest `keep`, the newest ten pinned ones besides, and `keep` older ones spread over the run.

    One that a newer one repeats, or that a rewind made unreachable, does not count. A pinned one can be spread too.

    Args:
        generations: of one run, newest first.
        keep: at least 1.
    """
    distinct = [new for index, new in enumerate(generations) if not _is_repeated(new, generations[:index])]
    newest, older = distinct[:keep], distinct[keep:]
    pinned = [generation for generation in older if generation.pinned][:KEEP_PINNED]
    kept = {generation.seq for generation in (*newest, *pinned, *_spread(newest, older, keep))}
    return tuple(generation for generation in generations if generation.seq not in kept)


def thinned(steps: Sequence[int], size: int) -> list[int]:
    """The steps to drop, so that `size` of them stay, spread over the run. The first and the newest always stay.

    The one whose neighbours are closest together is dropped first; of several, the earliest.

    Args:
        steps: increasing.
        size: at least 2.
    """
    left, dropped = list(steps), []
    while len(left) > size:
        spans = [after - before for before, after in zip(left, left[2:], strict=False)]
        dropped.append(left.pop(1 + spans.index(min(spans))))
    return dropped


def _spread(newest: Sequence[Generation], older: Sequence[Generation], count: int) -> list[Generation]:
    """At most `count` of `older`, whose ages in steps are about a geometric series; the oldest is always one of them.

    The one between whose neighbours' ages the ratio is smallest is dropped first: a trainer that goes back beyond it
    loses least. No state is needed: applied at every publication, the ratios it left only shrink as time passes.
    """
    reachable: list[Generation] = []
    earliest = min((generation.step for generation in newest), default=0)
    for generation in older:
        if generation.step < earliest:  # else a newer one serves a trainer that goes back to it
            reachable.append(generation)
            earliest = generation.step
    while len(reachable) > count:
        ages = [max(1, newest[0].step - generation.step) for generation in (newest[-1], *reachable)]
        ratios = [ages[index + 2] / ages[index] for index in range(len(reachable) - 1)]
        del reachable[ratios.index(min(ratios))]
    return reachable


def _is_repeated(generation: Generation, newer: Sequence[Generation]) -> bool:
    """Whether a newer generation has the same versions, as after a rewind, and is kept at least as long."""
    ids = {version.id for version in generation.versions}
    return any(
        ids == {version.id for version in other.versions} and (other.pinned or not generation.pinned) for other in newer
    )
