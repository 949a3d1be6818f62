"""The states and events of the sender. A failed or closed session returns every slot that was offered to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from ema_proto.errors import RejectCode
from ema_proto.wire import messages as m


class SenderState(Enum):
    """The state of a sender; see the diagram in `machine`."""

    DISCONNECTED = "disconnected"
    GREETING = "greeting"
    GREETED = "greeted"
    JOINING = "joining"
    STREAMING = "streaming"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Greeted:
    """The server accepted the connection; version and token are right. `capabilities` are those of both sides.

    `shm` is the path of the socket on which the server takes shared slots: pass them before the JOIN is written.
    """

    capabilities: tuple[str, ...] = ()
    shm: str | None = None


@dataclass(frozen=True, slots=True)
class JoinAccepted:
    """The run is ours: snapshots flow."""

    joined: m.Joined


@dataclass(frozen=True, slots=True)
class Refused:
    """A final refusal of the connection or the run; nothing more will be sent."""

    code: RejectCode
    text: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Close the transport, and open a fresh one at `retry_at`."""

    reason: str
    retry_at: float


@dataclass(frozen=True, slots=True)
class SnapshotDone:
    """The slot belongs to the caller again. `code` and `text` say why the snapshot was not applied, else None."""

    slot: int
    step: int
    code: RejectCode | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PublishedAt:
    """A generation at `step` became durable."""

    step: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A request of ours is done; with `error`, it was refused. `warning` is of a finished run, for its user."""

    request: int
    step: int | None
    error: str | None = None
    warning: str | None = None


Event: TypeAlias = Greeted | JoinAccepted | Refused | ConnectionLost | SnapshotDone | PublishedAt | Answered
