"""The snapshots of one run that its ranks are sending: which step fills which slot, and which ranks' parts are whole.

A step counts only if the part of every rank is whole. The first rank that begins a step takes a slot for it. A step
that a rank has skipped, or passed without a whole part, is dropped for all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ema_proto.limits import RECENT_STEPS, STEP_MAX
from ema_proto.wire import messages as m

DropReason: TypeAlias = Literal["skipped", "passed", "left", "lost", "silent", "late", "rewound"]

_REMEMBERED = 64  # dropped steps, so that each is counted once; ranks are at most a few steps apart

_Key: TypeAlias = tuple[int, bool]  # step, and whether it is a `set`: that comes after the update of the same step
_NOTHING: _Key = (-1, False)
_LAST: _Key = (STEP_MAX, True)


@dataclass(slots=True, eq=False)
class _Pending:
    slot: int
    key: _Key
    since: float
    whole: set[int] = field(default_factory=set)
    copying: dict[int, m.Begin] = field(default_factory=dict)  # of the whole parts, those that are not in the slot yet


@dataclass(frozen=True, slots=True)
class Dropped:
    """A step that cannot be whole any longer, because of `rank`: why, as one word and as text.

    `slot` is free again; None if no rank had begun the step.
    """

    slot: int | None
    step: int
    mode: m.Mode
    rank: int
    reason: DropReason
    why: str


class Assembly:
    """Slots of the snapshots of a run, which come from `ranks`.

    `last_step` is the last applied step, None without any; `recent` are the newest ones.
    """

    def __init__(self, *, ranks: Sequence[int], slots: int, last_step: int | None, recent: tuple[int, ...]) -> None:
        self.slots = slots
        self.last_step = last_step
        self.recent = deque(recent, maxlen=RECENT_STEPS)
        self.dropped: deque[Dropped] = deque()
        self._ranks = tuple(ranks)
        self._world = len(self._ranks)
        self._pending: list[_Pending] = []
        self._begun: dict[int, _Key] = {}
        self._lost: tuple[_Key, str] = (_NOTHING, "")  # the highest step that was dropped, and why
        self._reported: deque[int] = deque(maxlen=_REMEMBERED)

    def is_passed(self, step: int) -> bool:
        """Whether a step at or above this one is in the averages."""
        return self.last_step is not None and step <= self.last_step

    def begin(self, rank: int, begin: m.Begin, now: float) -> int | None:
        """A rank begins its part: the slot of the step, None when none is free. See `why_not` for what comes first."""
        key = _key(begin.step, begin.mode)
        self._pass(rank, key, "passed", f"rank {rank} passed it")
        self._begun[rank] = key
        pending = self._missing(rank, key)
        if pending is None:
            taken = {each.slot for each in self._pending}
            slot = next((slot for slot in range(self.slots) if slot not in taken), None)
            if slot is None:
                return None
            pending = _Pending(slot, key, now)
            self._pending.append(pending)
        return pending.slot

    def why_not(self, rank: int, begin: m.Begin) -> str | None:
        """Why this step cannot be whole, whatever the rank sends; None if it can. Such a step is dropped."""
        key = _key(begin.step, begin.mode)
        if self._world == 1 or self._missing(rank, key) is not None:
            return None
        passed = next((other for other, begun in self._begun.items() if other != rank and begun > key), None)
        lost, why = self._lost
        if key > lost and passed is None:
            return None
        how = "" if passed is None else f"rank {passed} {'has ended' if self._begun[passed] == _LAST else 'passed it'}"
        if passed is not None:
            self._report(None, key, passed, "passed", how)
        if key <= lost:
            return why if key == lost or lost == _LAST else "it was dropped"
        return how

    def skip(self, rank: int, step: int, why: str) -> None:
        """A rank sends no part of this step."""
        text = f"rank {rank} skipped it: {why}"
        key = step, False
        self._pass(rank, (step, True), "skipped", text)
        self._remember(key, text)
        self._report(None, key, rank, "skipped", text)

    def ended(self, rank: int) -> None:
        """A rank has sent its last step: no later one can be whole, unless it is `resumed`."""
        self._pass(rank, _LAST, "passed", f"rank {rank} has ended")
        self._begun[rank] = _LAST

    def resumed(self, rank: int) -> None:
        """A rank that had ended goes on."""
        if self._begun.get(rank) == _LAST:
            del self._begun[rank]

    def whole(self, rank: int, slot: int, copying: m.Begin | None = None) -> bool:
        """The part of a rank is whole; True if it was the last one. `copying`: it is still to be copied to the slot."""
        pending = next(each for each in self._pending if each.slot == slot)
        pending.whole.add(rank)
        if copying is not None:
            pending.copying[rank] = copying
        return self._is_complete(pending)

    def copied(self, rank: int, slot: int, begin: m.Begin) -> bool:
        """The part of a rank is in the slot; True if it was the last one. False also if the step was dropped since."""
        pending = next((each for each in self._pending if each.slot == slot), None)
        if pending is None or pending.copying.get(rank) is not begin:
            return False
        del pending.copying[rank]
        return self._is_complete(pending)

    def lose(self, rank: int, reason: DropReason, why: str) -> None:
        """A rank will not complete what it has begun."""
        self._begun.pop(rank, None)
        for pending in [each for each in self._pending if rank not in each.whole]:
            self._drop(pending, rank, reason, f"rank {rank} {why}")

    def joined(self, rank: int, first_step: int) -> None:
        """A rank has connected, and sends steps from `first_step` on: all that is unanswered, whole parts included."""
        for pending in self._pending:
            if not self._is_complete(pending):
                pending.whole.discard(rank)
                pending.copying.pop(rank, None)
        passed = first_step - 1, True
        self._pass(rank, passed, "passed", f"rank {rank} passed it")
        self._begun[rank] = passed

    def applied(self, slot: int) -> None:
        """The averager has applied the snapshot in this slot."""
        step, _ = self._take(slot).key
        self.last_step = step
        if step not in self.recent:
            self.recent.append(step)

    def quarantined(self, slot: int) -> None:
        """The averager has refused the snapshot in this slot."""
        self._take(slot)

    def rewound(self, last_step: int | None, recent: tuple[int, ...]) -> None:
        """The run is back at `last_step`: steps above it may come again."""
        self.last_step, self.recent = last_step, deque(recent, maxlen=RECENT_STEPS)
        self._begun.clear()
        self._lost = _NOTHING, ""
        self._reported.clear()

    def finish(self, rank: int) -> None:
        """This rank has finished the run: its slots are gone, and no other step can be whole."""
        why = f"rank {rank} has finished the run"
        for pending in [each for each in self._pending if not self._is_complete(each)]:
            self._drop(pending, rank, "passed", why)
        self._begun.clear()
        self._remember(_LAST, why)

    def drop_overdue(self, before: float) -> None:
        """Drop the steps that were begun before this time, and of which a rank has not begun its part."""
        for pending in [each for each in self._pending if each.since < before]:
            late = [
                rank
                for rank in self._ranks
                if rank not in pending.whole and self._begun.get(rank, _NOTHING) < pending.key
            ]
            if late:
                self._drop(pending, late[0], "late", f"rank {late[0]} has not begun it in time")

    @property
    def waits_for(self) -> set[int]:
        """The ranks that have begun no part of a step that others have begun, or have not completed it."""
        return {rank for pending in self._pending for rank in self._ranks if rank not in pending.whole}

    @property
    def is_applying(self) -> bool:
        """Whether a whole snapshot waits for the averager's answer."""
        return any(self._is_complete(each) for each in self._pending)

    def _is_complete(self, pending: _Pending) -> bool:
        return len(pending.whole) == self._world and not pending.copying

    def _missing(self, rank: int, key: _Key) -> _Pending | None:
        """The step, if a slot is taken for it and this rank's part is not whole."""
        return next((each for each in self._pending if each.key == key and rank not in each.whole), None)

    def _pass(self, rank: int, key: _Key, reason: DropReason, why: str) -> None:
        """A rank is past all steps below `key`: those of which it has not sent its part are dropped.

        If it is the only rank, it has abandoned what lies above, too.
        """
        for pending in list(self._pending):
            is_passed = pending.key < key or (self._world == 1 and pending.key > key)
            if is_passed and rank not in pending.whole:
                self._drop(pending, rank, reason, why)

    def _drop(self, pending: _Pending, rank: int, reason: DropReason, why: str) -> None:
        self._pending.remove(pending)
        self._remember(pending.key, why)
        self._report(pending.slot, pending.key, rank, reason, why)

    def _report(self, slot: int | None, key: _Key, rank: int, reason: DropReason, why: str) -> None:
        """Report a dropped step: one that holds a slot always, others once."""
        step, is_set = key
        if slot is None and step in self._reported:
            return
        self._reported.append(step)
        self.dropped.append(Dropped(slot, step, "set" if is_set else "update", rank, reason, why))

    def _remember(self, key: _Key, why: str) -> None:
        if key > self._lost[0]:
            self._lost = key, why

    def _take(self, slot: int) -> _Pending:
        pending = next(each for each in self._pending if each.slot == slot)
        self._pending.remove(pending)
        return pending


def _key(step: int, mode: m.Mode) -> _Key:
    return step, mode == "set"
