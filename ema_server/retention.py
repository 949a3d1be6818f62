"""Which generations of a run may go. Pure: generations in, generations out; who holds them is the catalog's to say."""

from __future__ import annotations

from collections.abc import Sequence

from ema_server.catalog import Generation

KEEP_PINNED = 10  # those a trainer asked for, to go with its own checkpoints


def expired(generations: Sequence[Generation], keep: int) -> tuple[Generation, ...]:
    """All but the newest `keep` and, besides, the newest ten pinned ones. What a newer one repeats does not count.

    Args:
        generations: those of one run, newest first.
        keep: at least 1.
    """
    distinct = [new for index, new in enumerate(generations) if not _is_repeated(new, generations[:index])]
    older = distinct[keep:]
    pinned = [generation for generation in older if generation.pinned][:KEEP_PINNED]
    kept = {generation.seq for generation in (*distinct[:keep], *pinned)}
    return tuple(generation for generation in generations if generation.seq not in kept)


def _is_repeated(generation: Generation, newer: Sequence[Generation]) -> bool:
    """Whether a newer generation has the same versions, as after a rewind, and is kept at least as long."""
    ids = {version.id for version in generation.versions}
    return any(
        ids == {version.id for version in other.versions} and (other.pinned or not generation.pinned) for other in newer
    )
