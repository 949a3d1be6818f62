"""What the training thread and the connection's thread both see. Every field is read and written under `changed`.

Neither side holds the condition while it uses a socket or copies weights.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto.sender.events import Refused, SenderState
from ema_proto.wire.messages import Joined
from trainer_client.staging.slots import Slot

_REMEMBERED = 16  # snapshots


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What became of the snapshots. Steps are None before the first; `lane` is before the run is joined."""

    state: str
    offered: int
    committed: int
    dropped: dict[str, int]
    reconnects: int
    last_offered_step: int | None
    last_committed_step: int | None
    last_published_step: int | None
    lane: str | None = None


class Shared:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.state = SenderState.DISCONNECTED
        self.down_since: float | None = time.monotonic()
        self.outage: str | None = None  # why the connection was lost, until it is back
        self.outage_logged = False
        self.greeted = False
        self.capabilities: tuple[str, ...] = ()  # of both sides
        self.shm: str | None = None  # where the server that greeted last takes slots in shared memory
        self.lane: str | None = None  # how snapshots are sent, since the run is joined
        self.lane_problem: str | None = None  # why the server did not take the slots in shared memory
        self.hung_up = False  # a connection ended before the server had greeted
        self.joined: Joined | None = None
        self.refused: Refused | None = None
        self.free: list[Slot] = []
        self.in_flight = 0
        self.offered = 0
        self.committed = 0
        self.reconnects = 0
        self.dropped: Counter[str] = Counter()
        self.sent_at: dict[int, float] = {}  # by slot, in seconds
        self.applying_s: deque[float] = deque(maxlen=_REMEMBERED)  # see `Worker.applying_s`
        self.last_offered: int | None = None
        self.last_committed: int | None = None
        self.last_published: int | None = None

    @property
    def streaming(self) -> bool:
        return self.state is SenderState.STREAMING

    def show(self, state: SenderState, now: float) -> None:
        """Set the sender's state, and since when the server is unreachable."""
        self.state = state
        if state not in (SenderState.DISCONNECTED, SenderState.GREETING):
            self.down_since = None
        elif self.down_since is None:
            self.down_since = now

    def is_down_for(self, seconds: float) -> bool:
        """Whether the server has been unreachable for `seconds`."""
        return self.down_since is not None and time.monotonic() - self.down_since >= seconds

    def wait(self, until: Callable[[], object], timeout_s: float) -> bool:
        """Wait, holding `changed`, until a predicate holds; whether it does."""
        return bool(self.changed.wait_for(until, max(0.0, timeout_s)))
