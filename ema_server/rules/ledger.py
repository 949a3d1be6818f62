"""The steps at which an average was updated, as arithmetic ranges.

A float64 replay of the trainer's weights over `steps()` and `set_steps` gives the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any


class Ledger:
    """The steps of one average, strictly increasing.

    Args:
        origin: the number of steps already taken when the run was first joined.
    """

    __slots__ = ("_ranges", "_set", "origin")

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self._ranges: list[list[int]] = []  # [first, last, stride], maximal from the left
        self._set: list[int] = []

    @property
    def last_step(self) -> int | None:
        """The newest step, None before the first."""
        return self._ranges[-1][1] if self._ranges else None

    @property
    def first_step(self) -> int | None:
        """The oldest step, None before the first."""
        return self._ranges[0][0] if self._ranges else None

    @property
    def set_steps(self) -> tuple[int, ...]:
        """The steps at which the weights replaced the average; the first step always does."""
        return tuple(self._set)

    def append(self, step: int, *, replaces: bool = False) -> None:
        """Record an update at `step`; `replaces`: the weights replaced the average, as the first step always does.

        Raises:
            ValueError: `step` is not above the last step, or equal to it without `replaces`.
        """
        last = self.last_step
        if last is not None and (step < last or (step == last and not replaces)):
            raise ValueError(f"step {step} does not follow step {last}")
        if (replaces or last is None) and (not self._set or self._set[-1] != step):
            self._set.append(step)
        if step != last:
            self._extend(step)

    def steps(self) -> Iterator[int]:
        """Every step, increasing."""
        return chain.from_iterable(range(first, last + 1, stride) for first, last, stride in self._ranges)

    def newest_first(self) -> Iterator[int]:
        """Every step, decreasing."""
        return chain.from_iterable(range(last, first - 1, -stride) for first, last, stride in reversed(self._ranges))

    def tail(self, count: int) -> tuple[int, ...]:
        """The newest `count` steps, increasing."""
        return tuple(reversed(list(islice(self.newest_first(), count))))

    def to_json(self) -> dict[str, Any]:
        return {"origin": self.origin, "set": list(self._set), "ranges": [list(entry) for entry in self._ranges]}

    @classmethod
    def from_json(cls, value: object) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            ValueError: the value is not a ledger.
        """
        try:
            return cls._read(value)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not a ledger: {error!r}") from None

    @classmethod
    def _read(cls, value: Any) -> Ledger:
        ledger = cls(_integer(value["origin"]))
        for first, last, stride in value["ranges"]:
            known = ledger.last_step
            rises = (known is None or known < _integer(first)) and first <= _integer(last)
            if not rises or _integer(stride) < 1 or (last - first) % stride:
                raise ValueError(f"range {[first, last, stride]} after step {known}")
            ledger._ranges.append([first, last, stride])
        ledger._set = [_integer(step) for step in value["set"]]
        return ledger

    def _extend(self, step: int) -> None:
        if self._ranges:
            first, last, stride = self._ranges[-1]
            if first == last:
                self._ranges[-1] = [first, step, step - first]
                return
            if step == last + stride:
                self._ranges[-1][1] = step
                return
        self._ranges.append([step, step, 1])


def _integer(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a step")
    return value
