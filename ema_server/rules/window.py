"""Which snapshots a window average is the mean of, how often each one counts, and which slot holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Entry:
    step: int
    count: int
    slot: int


Entries: TypeAlias = tuple[Entry, ...]  # oldest first


def entered(entries: Entries, size: int, step: int, due: int) -> Entries:
    """The window after the snapshot of `step`.

    Args:
        entries: the window before it.
        size: the number of snapshots that the window holds, and of its slots.
        step: above the step of the last entry.
        due: how many of the window's own steps the snapshot stands for; 0 leaves the window unchanged.
    """
    if not due:
        return entries
    free = size - min(due, size)
    kept: list[Entry] = []
    for entry in reversed(entries):
        stays = min(entry.count, free)
        free -= stays
        kept += [replace(entry, count=stays)] if stays else []
    taken = {entry.slot for entry in kept}
    return (*reversed(kept), Entry(step, min(due, size), next(slot for slot in range(size) if slot not in taken)))


def blends(entries: Entries) -> tuple[float, ...]:
    """The weight of each entry in the mean of the entries up to it: 1 for the first."""
    weights, total = [], 0
    for entry in entries:
        total += entry.count
        weights.append(entry.count / total)
    return tuple(weights)


def mean_age(entries: Entries, now: int) -> float:
    """Mean age of the snapshots at step `now`, in steps; 0 without any."""
    return sum(entry.count * (now - entry.step) for entry in entries) / max(sum(entry.count for entry in entries), 1)


def share_of(entries: Entries, step: int) -> float:
    """Share of the snapshot of `step` in the mean, 0 if it is not in the window; `entries` is not empty."""
    return sum(entry.count for entry in entries if entry.step == step) / sum(entry.count for entry in entries)


def restored(kept: Sequence[tuple[int, int]], size: int) -> Entries:
    """Entries from (step, count), oldest first, in slots 0, 1, ...

    Raises:
        ValueError: they do not form a window of this size.
    """
    counts = [count for _, count in kept]
    rises = all(first < second for (first, _), (second, _) in pairwise(kept))
    if not rises or any(count < 1 for count in counts) or sum(counts) > size:
        raise ValueError(f"{list(kept)} are not the steps and counts of a window of {size} snapshots")
    return tuple(Entry(step, count, slot) for slot, (step, count) in enumerate(kept))
