"""Jobs waiting for the averager. Any thread puts, one takes; what they mean is known only as far as `apply_is_next`."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from ema_server.averager.jobs import Apply, Job, Publish
from ema_server.publishing.publisher import PublishResult


@dataclass(frozen=True, slots=True)
class PublishDone:
    """The publisher is done with the run's generation."""

    run: str
    landed: PublishResult


@dataclass(frozen=True, slots=True)
class Stop:
    """Publish everything and end."""


Item: TypeAlias = Job | PublishDone | Stop


class Inbox:
    """A queue that can be looked into. It is bounded by its senders: two snapshots and one request for each run."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: deque[Item] = deque()

    def put(self, item: Item) -> None:
        """Add an item; never blocks for longer than the lock is held."""
        with self._condition:
            self._items.append(item)
            self._condition.notify()

    def take(self, timeout_s: float) -> Item | None:
        """The oldest item, None when there is none within `timeout_s`."""
        with self._condition:
            self._condition.wait_for(lambda: bool(self._items), timeout_s)
            return self._items.popleft() if self._items else None

    def apply_is_next(self, run: str) -> bool:
        """Whether the next job waiting for `run`, besides wishes to publish it, is a snapshot."""
        with self._condition:
            items = (item for item in self._items if not isinstance(item, Stop | Publish) and item.run == run)
            return isinstance(next(items, None), Apply)

    def __len__(self) -> int:
        with self._condition:
            return len(self._items)
