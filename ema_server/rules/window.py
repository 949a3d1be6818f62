"""Which snapshots a window average is the mean of, how often each counts, and in which slot it lies. Pure bookkeeping.

Comes in: a snapshot's step and the number of the window's own steps that it stands for. Goes out: entries, and the
weights with which the mean is made of them. The bytes of the snapshots are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Entry:
    """A snapshot in the window: its step, how often it counts, and its slot."""

    step: int
    count: int
    slot: int


Entries: TypeAlias = tuple[Entry, ...]  # oldest first


def entered(entries: Entries, size: int, step: int, due: int) -> Entries:
    """The window after the snapshot of `step`, which stands for `due` of its steps: what a dense stream of it leaves.

    Args:
        entries: the window before.
        size: how many snapshots it holds, and how many slots there are.
        step: above the last entry's.
        due: 0 leaves the window as it is.
    """
    if not due:
        return entries
    room = size - min(due, size)
    kept: list[Entry] = []
    for entry in reversed(entries):
        stays = min(entry.count, room)
        room -= stays
        kept += [replace(entry, count=stays)] if stays else []
    taken = {entry.slot for entry in kept}
    return (*reversed(kept), Entry(step, min(due, size), next(slot for slot in range(size) if slot not in taken)))


def blends(entries: Entries) -> tuple[float, ...]:
    """The weight of each entry in the mean of those up to it, 1 for the first: one after another blended in."""
    weights, total = [], 0
    for entry in entries:
        total += entry.count
        weights.append(entry.count / total)
    return tuple(weights)


def mean_age(entries: Entries, now: int) -> float:
    """Mean age of the snapshots at step `now`, in steps; 0 without any."""
    return sum(entry.count * (now - entry.step) for entry in entries) / max(sum(entry.count for entry in entries), 1)


def share_of(entries: Entries, step: int) -> float:
    """Share of the snapshot of `step` in the mean, 0 where it is not there; `entries` are some."""
    return sum(entry.count for entry in entries if entry.step == step) / sum(entry.count for entry in entries)


def restored(kept: Sequence[tuple[int, int]], size: int) -> Entries:
    """Entries of (step, count), oldest first, in slots by their order.

    Raises:
        ValueError: they are no window of this size.
    """
    counts = [count for _, count in kept]
    rises = all(first < second for (first, _), (second, _) in pairwise(kept))
    if not rises or any(count < 1 for count in counts) or sum(counts) > size:
        raise ValueError(f"{list(kept)} are not the snapshots of a window of {size}")
    return tuple(Entry(step, count, slot) for slot, (step, count) in enumerate(kept))
