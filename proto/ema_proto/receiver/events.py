"""Where a body belongs, and the requests of trainers that the averager has to answer.

`ticket` identifies one session's claim; an answer with a stale ticket is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ema_proto.receiver.assembly import DropReason
from ema_proto.wire import messages as m
from ema_proto.wire.files import FileSpec
from ema_proto.wire.parts import Part


@dataclass(frozen=True, slots=True)
class Payload:
    """Receive `length` bytes into the slot of the run's gang, at `offset` of the rank's part; then call `payload`."""

    ticket: int
    rank: int
    slot: int
    attempt: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FileBody:
    """Receive exactly `length` bytes and pass them to `file_payload`."""

    length: int


@dataclass(frozen=True, slots=True)
class Control:
    """Receive a body of `length` bytes and pass it to `control`."""

    length: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop whatever follows the header."""


Target: TypeAlias = Payload | FileBody | Control | Discard


@dataclass(frozen=True, slots=True)
class JoinRequested:
    """A trainer may have the run: create, continue or rewind it, then `accept_join` or `refuse_join`.

    `join` is that of the whole trainer; `parts` says what each rank sends, and `sessions` names the ranks' sessions.
    """

    run: str
    ticket: int
    join: m.Join
    parts: tuple[Part, ...]
    sessions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FileReceived:
    """Store a part of a companion file, which begins at byte `offset`; then `file_stored` or `failed`.

    Parts come in order. With the last one of a file, its size and sha256 are to be checked.
    """

    run: str
    ticket: int
    file: FileSpec
    offset: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class PartReady:
    """The part of a rank lies in its shared slot `source`: copy it to its places in `slot`.

    Then call `copied` with the event. Copies into one slot are to be made in the order of these events, also of steps
    that are dropped meanwhile.
    """

    run: str
    ticket: int
    rank: int
    slot: int
    source: int
    begin: m.Begin


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """A whole snapshot lies in the slot: apply it, then `applied` or `quarantined`.

    `source` is the trainer's own slot in which it lies instead, if that is shared.
    """

    run: str
    ticket: int
    slot: int
    step: int
    mode: m.Mode
    source: int | None = None


@dataclass(frozen=True, slots=True)
class StepDropped:
    """A step of a sharded trainer cannot be whole: which rank is the cause, and why, as one word and as text."""

    run: str
    ticket: int
    step: int
    rank: int
    reason: DropReason
    why: str


@dataclass(frozen=True, slots=True)
class RanksMissing:
    """These ranks of a sharded trainer, in order, are gone or silent, and no step is whole without them; or none is."""

    run: str
    ticket: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PublishRequested:
    """Make everything before this event durable, then `publish_answered`."""

    run: str
    ticket: int
    rank: int
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
    """The run no longer has a trainer: it said goodbye, or (`lost`) fell silent."""

    run: str
    ticket: int
    lost: bool


ReceiverEvent: TypeAlias = (
    JoinRequested
    | FileReceived
    | PartReady
    | SnapshotReady
    | StepDropped
    | RanksMissing
    | PublishRequested
    | RewindRequested
    | FinishRequested
    | SessionEnded
)
