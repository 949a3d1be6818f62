"""A progress bar on the terminal. Comes in: sizes and byte counts; goes out: one line on stderr, and only on a tty."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ema_reader.download import Silent
from ema_reader.partial import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


@contextmanager
def default_progress() -> Iterator[Progress]:
    """A bar when stderr is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    with _bars() as bars:
        yield Bar(bars)


class Bar:
    """One line for each file."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks = {str(task.description): task.id for task in bars.tasks}
        self._name = ""

    def start(self, name: str, size: int, done: int) -> None:
        """A file begins (or begins anew) with `done` of `size` bytes already there."""
        self._name = name
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=size)
        self._bars.update(self._tasks[name], completed=done)

    def advance(self, count: int) -> None:
        """`count` more bytes are there."""
        self._bars.update(self._tasks[self._name], advance=count)


def _bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
