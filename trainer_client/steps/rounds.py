"""Decides after which optimizer's step a snapshot is taken, when several optimizers train one model.

One of them counts the steps. Its snapshot is due when the last optimizer of the round has stepped: a round is one pass
through the training loop, in whichever order and however often each optimizer steps in it. The order is learned from
earlier rounds. Until it is known, the snapshot waits for the next round to begin, which is always correct.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Final

# This many steps of one optimizer in a row may be part of one round (a critic's); more mean that no other takes part.
PATIENCE: Final = 128
_REMEMBERED: Final = 4


class Rounds:
    """The steps of several optimizers, which are numbered from 0.

    Attributes:
        counter: the optimizer whose steps are counted.
        members: the number of optimizers.
        current: the one that stepped last.
        stepped: those that have stepped at all.
        pending: the counter has stepped, and the snapshot of that step is still to be taken.
    """

    def __init__(self, members: int) -> None:
        self.counter = 0
        self.members = members
        self.pending = False
        self._first: int | None = None  # began the first round, and so begins each
        self.current: int | None = None
        self._length = 0  # steps of the current one in a row
        self.stepped: set[int] = set()
        # For each optimizer, how many steps in a row it took recently, and which one followed.
        self._ended: defaultdict[int, deque[tuple[int, int]]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def before(self, member: int) -> bool:
        """`member` is about to step; whether the pending snapshot must be taken before that."""
        due = self.pending and member in (self.counter, self._first)
        self.pending = self.pending and not due
        return due

    def after(self, member: int) -> bool:
        """`member` has stepped; whether a snapshot is due now."""
        if self.members == 1:
            self._first, self.current, self._length = member, member, 1
            self.stepped.add(member)
            return True
        if self._first is None:
            self._first = member
        if member != self.current:
            if self.current is not None:
                length = self._length if self._length <= PATIENCE else 1  # else it took no part in rounds
                self._ended[self.current].append((length, member))
            self.current, self._length = member, 0
        self._length += 1
        self.stepped.add(member)
        self.pending = self.pending or member == self.counter
        due = self.pending and not self._may_go_on(member)
        self.pending = self.pending and not due
        return due

    def _may_go_on(self, member: int) -> bool:
        """Whether the next step may belong to the same round."""
        ended, begins = self._ended[member], {self.counter, self._first}
        if not ended:
            is_last = member == self.counter and len(self.stepped) == self.members
            return not is_last and self._length <= PATIENCE
        longest = max(length for length, _ in ended)
        if member not in begins and self._length < longest:
            return True
        if self._length <= longest:
            followers = {follower for length, follower in ended if length == self._length}
        else:
            followers = {follower for _, follower in ended if self._length <= longest + PATIENCE}
        return bool(followers - begins)
