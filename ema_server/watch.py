"""Waiting for the end of the server: a signal asks for it, or one of its threads has died.

Comes in: the event that signals set, and how to ask each thread. Goes out: what has died, if anything. A server whose
averager is gone still answers HTTP, so nobody who supervises the process would notice by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

LOOK_EVERY_S = 1.0


async def until_over(
    asked: asyncio.Event, alive: Mapping[str, Callable[[], bool]], look_every_s: float = LOOK_EVERY_S
) -> tuple[str, ...]:
    """Return once `asked` is set or a thread is dead; the names of the dead ones.

    Args:
        asked: set from outside when the server is to end.
        alive: for each thread, by name, whether it still runs.
        look_every_s: seconds between two looks at the threads.
    """
    while True:
        dead = tuple(name for name, is_alive in alive.items() if not is_alive())
        if dead or asked.is_set():
            return dead
        try:
            await asyncio.wait_for(asked.wait(), look_every_s)
        except TimeoutError:
            continue
