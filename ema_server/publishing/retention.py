"""Which generations of a run, and snapshots of its ring, may go. Pure; who holds them is not known here.

Besides the newest some older ones stay, the first among them, for a trainer that resumes from a checkpoint of which
nobody told the server: the farther back it goes, the farther it may be to the generation before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_server.storage.catalog import Generation

KEEP_PINNED = 10  # those a trainer asked for, to go with its own checkpoints


def expired(generations: Sequence[Generation], keep: int) -> tuple[Generation, ...]:
    """All but the newest `keep`, the newest ten pinned ones besides, and `keep` older ones spread over the run.

    What a newer one repeats, or a rewind has left behind, takes nobody's place; a pinned one can be a spread one too.

    Args:
        generations: those of one run, newest first.
        keep: at least 1.
    """
    distinct = [new for index, new in enumerate(generations) if not _is_repeated(new, generations[:index])]
    newest, older = distinct[:keep], distinct[keep:]
    pinned = [generation for generation in older if generation.pinned][:KEEP_PINNED]
    kept = {generation.seq for generation in (*newest, *pinned, *_spread(newest, older, keep))}
    return tuple(generation for generation in generations if generation.seq not in kept)


def thinned(steps: Sequence[int], size: int) -> list[int]:
    """The steps to drop, so that `size` of them stay spread over the run: the first and the newest always do.

    One after another goes the one whose neighbours are closest together, of several the earliest.

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
    """At most `count` of `older`, their ages in steps about a geometric series; the oldest is always one of them.

    One after another goes the one between whose neighbours' ages the ratio is smallest: who has to go back beyond it
    loses least. It needs no memory: applied at every publication, the ratios that it left only shrink as time passes.
    """
    reachable: list[Generation] = []
    earliest = min((generation.step for generation in newest), default=0)
    for generation in older:
        if generation.step < earliest:  # else a newer one serves whoever goes back to it, or beyond it
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
