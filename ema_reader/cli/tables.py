"""Aligned tables. On a terminal, columns that do not fit are left out and named; no value is ever cut."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import typer

_GAP = 2  # spaces between two columns


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, optional: Sequence[str] = (), long: bool = False
) -> str:
    """Columns with their names above, numbers to the right; None is shown as a dash.

    Args:
        columns: the names, in the order of the cells.
        rows: the cells of each line.
        optional: columns that may be left out on a terminal too narrow for all, the most important first. The last line
            names those that are.
        long: show every column, whatever the terminal's width.
    """
    positions = range(len(columns))
    texts = [[columns[at], *(_cell(row[at]) for row in rows)] for at in positions]
    widths = [max(map(len, cells)) for cells in texts]
    terminal = terminal_width()
    shown = set(columns) if long or terminal is None else _fitting(columns, widths, optional, terminal)
    aligned = []
    for at in positions:
        if columns[at] in shown:
            is_numeric = all(isinstance(row[at], int | float | None) for row in rows)
            aligned.append([text.rjust(widths[at]) if is_numeric else text.ljust(widths[at]) for text in texts[at]])
    title, *lines = [(" " * _GAP).join(cells).rstrip() for cells in zip(*aligned, strict=True)]
    left_out = [name for name in columns if name not in shown]
    return "\n".join([styled(title, bold=True), *lines, *wrapped(_left_out_notes(left_out))])


def styled(text: str, **style: Any) -> str:
    """Text in a style, which `typer.echo` removes where stdout is no terminal. `NO_COLOR` switches styles off."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def terminal_width() -> int | None:
    """Columns of the terminal; None where stdout is none, and nothing limits a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(notes: Iterable[str]) -> list[str]:
    """The lines of notes below a table: broken between words on a terminal too narrow for them."""
    terminal = terminal_width()
    if terminal is None:
        return list(notes)
    return [
        line for note in notes for line in textwrap.wrap(note, terminal, break_long_words=False, break_on_hyphens=False)
    ]


def _fitting(columns: Sequence[str], widths: Sequence[int], optional: Sequence[str], terminal: int) -> set[str]:
    """The columns that are not optional, and as many of the others as fit, by importance.

    Columns of the same name, as of a metric named `step`, are shown or left out together.
    """
    needed: Counter[str] = Counter()
    for name, width in zip(columns, widths, strict=True):
        needed[name] += width + _GAP
    shown = set(columns).difference(optional)
    left = terminal + _GAP - sum(needed[name] for name in shown)
    for name in optional:
        if name not in shown and needed[name] <= left:
            shown.add(name)
            left -= needed[name]
    return shown


def _left_out_notes(names: Sequence[str]) -> list[str]:
    return [f"(too wide for this terminal: {', '.join(names)}; --long or --json shows them)"] if names else []


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
