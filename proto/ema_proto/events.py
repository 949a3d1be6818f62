"""What the receiver asks of the keeper of the runs. `ticket` names one session's claim; a stale one is ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ema_proto import messages as m


@dataclass(frozen=True, slots=True)
class JoinRequested:
    """A session may have the run: create, continue or rewind it, then `accept_join` or `refuse_join`."""

    run: str
    ticket: int
    join: m.Join


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """A whole snapshot lies in the slot: apply it, then `applied` or `quarantined`."""

    run: str
    ticket: int
    slot: int
    step: int
    mode: m.Mode


@dataclass(frozen=True, slots=True)
class PublishRequested:
    """Make everything before this event durable, then `publish_answered`."""

    run: str
    ticket: int
    request: int
    pin: bool


@dataclass(frozen=True, slots=True)
class RewindRequested:
    """Go back to the newest generation at or before `step`, then `rewound`."""

    run: str
    ticket: int
    request: int
    step: int


@dataclass(frozen=True, slots=True)
class FinishRequested:
    """Publish and finish the run, then `finished`."""

    run: str
    ticket: int
    request: int


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The run has no trainer any more: it said goodbye, or (`lost`) fell silent."""

    run: str
    ticket: int
    lost: bool


ReceiverEvent: TypeAlias = (
    JoinRequested | SnapshotReady | PublishRequested | RewindRequested | FinishRequested | SessionEnded
)
