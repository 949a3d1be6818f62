"""Results of a benchmark: figures of several rounds, their spread, and the Markdown table that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def ratio(cls, ours: Sequence[float], rivals: Sequence[float]) -> Self:
        """The spread of the quotients of one round each."""
        return cls.of([our / rival for our, rival in zip(ours, rivals, strict=True)])

    def show(self, unit: str = "", scale: float = 1.0, sign: str = "") -> str:
        """`median unit (lowest to highest)`, each value times `scale`, to three digits; with the sign "+", signed."""
        shown = [_three_digits(value * scale, sign) for value in (self.median, self.low, self.high)]
        return f"{shown[0]}{unit and ' ' + unit} ({shown[1]} to {shown[2]})"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: what is compared, both figures as text, our figure over the rival's, and the target."""

    what: str
    ours: str
    rival: str
    ratio: Spread
    aim: str


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one benchmark, under its title; `rival` heads their third column. A note explains missing rows."""

    title: str
    rival: str
    rows: tuple[Row, ...]
    note: str = ""

    def markdown(self) -> str:
        """A heading, the table, the note."""
        lines = [f"### {self.title}", ""]
        if self.rows:
            lines += [f"| | ours | {self.rival} | ratio | aim |", "|---|---|---|---|---|"]
            lines += [f"| {r.what} | {r.ours} | {r.rival} | {r.ratio.show()} | {r.aim} |" for r in self.rows]
        if self.note:
            lines += ([""] if self.rows else []) + [self.note]
        return "\n".join(lines)


def interleaved(rounds: int, **arms: Callable[[], float]) -> dict[str, list[float]]:
    """What each arm returns, `rounds` times in turn (A B A B ...), after one round that is discarded."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            value = arm()
            if turn:
                found[name].append(value)
    return found


def _three_digits(value: float, sign: str) -> str:
    """Without scientific notation, and with at least two decimals below 10."""
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2
    return f"{value:{sign}.{decimals}f}"
