"""Unanswered snapshots and requests in order; snapshots are cut into chunks as credit allows.

On the lane `shm` a snapshot has no chunks: the server reads it in its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ema_proto.errors import LocalProtocolError, RejectCode
from ema_proto.sender.file_queue import FilePayload, FileQueue
from ema_proto.wire import messages as m
from ema_proto.wire.chunks import count_chunks
from ema_proto.wire.codec import encode

_ATTEMPT_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes [offset, offset + length) of a slot."""

    slot: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to write: the header, then `body`, or the payload's bytes in its place.

    With `checksum` the writer passes the header through `codec.with_crc32` once it has the payload's bytes at hand.
    """

    header: bytes
    body: bytes
    payload: Payload | FilePayload | None = None
    checksum: bool = False


class Phase(Enum):
    """How much of a snapshot has been written on the current connection."""

    BEGIN = "begin"
    CHUNKS = "chunks"
    AWAITING = "awaiting"


@dataclass(slots=True)
class Snapshot:
    """A snapshot that is not answered yet."""

    slot: int
    step: int
    mode: m.Mode
    phase: Phase = Phase.BEGIN
    attempt: int = 0
    tries: int = 0
    sent_bytes: int = 0
    dropped: RejectCode | None = None


@dataclass(slots=True)
class Request:
    """A PUBLISH, REWIND or FINISH that is not answered yet; `last_step` is the step offered last before it."""

    number: int
    message: m.Publish | m.Rewind | m.Finish
    last_step: int
    written: bool = False

    @property
    def is_barrier(self) -> bool:
        """Whether nothing may be written behind it before it is answered: the answer decides what may follow."""
        return isinstance(self.message, m.Rewind | m.Finish)


@dataclass(slots=True)
class Skip:
    """A due step of which this rank of several sends nothing; it stands for all earlier ones that wait with it."""

    step: int
    why: str


class StreamQueue:
    """Unanswered items in the order in which they were offered, and the credit of the current connection.

    Companion files that the server lacks go before all of them.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.checksum = False
        self.chunk_bytes = 1
        self.credit_limit = 0
        self.is_shared = False  # whether the server has mapped the slots
        self.files = FileQueue()
        self._last_step = 0
        self._items: deque[Snapshot | Request | Skip] = deque()
        self._chunks_sent = 0
        self._attempts = 0
        self._requests = 0

    @property
    def awaiting(self) -> bool:
        """Whether a file is to be sent, or a snapshot is unanswered that does not wait behind a REWIND or FINISH."""
        if self.files:
            return True
        for item in self._items:
            if isinstance(item, Snapshot):
                return True
            if isinstance(item, Request) and item.is_barrier:
                return False
        return False

    @property
    def request_asked(self) -> int | None:
        """Number of the oldest request that was written and is not answered."""
        return next((item.number for item in self._items if isinstance(item, Request) and item.written), None)

    def next_step(self, first_step: int) -> int:
        """The step that a reconnecting session will send next."""
        for item in self._items:
            if isinstance(item, Snapshot):
                return item.step + (item.mode == "set")  # its step is already taken
        return max(first_step, self._last_step + 1)

    def add_snapshot(self, slot: int, step: int, mode: m.Mode) -> None:
        """Append a snapshot; steps only grow, a rewind apart. A `set` may repeat the newest step."""
        if step + (mode == "set") <= self._last_step:
            raise LocalProtocolError(f"step {step} is not after step {self._last_step}, which was offered before")
        self._last_step = step
        self._items.append(Snapshot(slot, step, mode))

    def add_skip(self, step: int, why: str) -> None:
        """Append that a step is skipped; it goes out after the snapshots before it."""
        if step <= self._last_step:
            raise LocalProtocolError(f"step {step} is not after step {self._last_step}, which was offered before")
        self._last_step = step
        if self._items and isinstance(self._items[-1], Skip):
            self._items.pop()
        self._items.append(Skip(step, why))

    def add_request(self, build: Callable[[int], m.Publish | m.Rewind | m.Finish]) -> int:
        """Append the request that `build` makes of its number; returns the number."""
        self._requests += 1
        message = build(self._requests)
        self._items.append(Request(self._requests, message, self._last_step))
        if isinstance(message, m.Rewind):
            self._last_step = message.step
        return self._requests

    def next_frame(self, session: bytes, epoch: int) -> Outgoing | None:
        """The next message that order and credit allow.

        A request waits until every snapshot before it is answered: one that had to be sent again would otherwise come
        after the generation that should hold it, or after the REWIND that undid it.
        """
        if self.files:
            return self._next_part(session, epoch)
        unanswered = False
        for item in self._items:
            if isinstance(item, Snapshot):
                if item.phase is not Phase.AWAITING:
                    return self._next_of(item, session, epoch)
                unanswered = True
            elif isinstance(item, Skip):
                self._items.remove(item)
                return Outgoing(*encode(m.Skip(item.step, item.why), session=session, epoch=epoch))
            elif not item.written:
                if unanswered:
                    return None
                item.written = True
                return Outgoing(*encode(item.message, session=session, epoch=epoch))
            elif item.is_barrier:
                return None
        return None

    def _next_of(self, snapshot: Snapshot, session: bytes, epoch: int) -> Outgoing | None:
        if snapshot.sent_bytes == self.nbytes:
            snapshot.phase = Phase.AWAITING
            chunks = 0 if self.is_shared else count_chunks(self.nbytes, self.chunk_bytes)
            commit = m.Commit(snapshot.step, snapshot.attempt, chunks, self.nbytes)
            return Outgoing(*encode(commit, session=session, epoch=epoch))
        if self._chunks_sent >= self.credit_limit:
            return None
        if snapshot.phase is Phase.BEGIN:
            self._attempts = self._attempts % _ATTEMPT_MAX + 1
            snapshot.phase, snapshot.attempt, snapshot.tries = Phase.CHUNKS, self._attempts, snapshot.tries + 1
            if self.is_shared:
                snapshot.sent_bytes = self.nbytes
            begin = m.Begin(snapshot.step, snapshot.attempt, snapshot.mode, snapshot.slot if self.is_shared else None)
            return Outgoing(*encode(begin, session=session, epoch=epoch))
        offset = snapshot.sent_bytes
        length = min(self.chunk_bytes, self.nbytes - offset)
        self._chunks_sent += 1
        snapshot.sent_bytes += length
        header, _ = encode(m.Chunk(snapshot.step, snapshot.attempt, offset, length), session=session, epoch=epoch)
        return Outgoing(header, b"", Payload(snapshot.slot, offset, length), self.checksum)

    def _next_part(self, session: bytes, epoch: int) -> Outgoing | None:
        if self._chunks_sent >= self.credit_limit:
            return None
        self._chunks_sent += 1
        part, payload = self.files.next_part(self.chunk_bytes)
        header, _ = encode(part, session=session, epoch=epoch)
        return Outgoing(header, b"", payload, self.checksum)

    def find(self, step: int, attempt: int) -> Snapshot | None:
        for item in self._items:
            if isinstance(item, Snapshot) and (item.step, item.attempt) == (step, attempt):
                return item
        return None

    def remove(self, item: Snapshot | Request) -> None:
        self._items.remove(item)

    def is_oldest(self, snapshot: Snapshot) -> bool:
        return next(item for item in self._items if isinstance(item, Snapshot)) is snapshot

    def take_answered(self, number: int | None) -> Request | None:
        """Remove and return the written request of this number; None when there is none."""
        for item in self._items:
            if isinstance(item, Request) and item.written and item.number == number:
                self.remove(item)
                return item
        return None

    def undo(self, refused: Request) -> list[Snapshot]:
        """Remove and return, `dropped`, the snapshots that a refused REWIND would have made possible."""
        if not isinstance(refused.message, m.Rewind):
            return []
        stale: list[Snapshot] = []
        for item in self._items:
            if isinstance(item, Snapshot) and item.step <= refused.last_step:
                item.dropped = RejectCode.STEP_PASSED
                stale.append(item)
            elif isinstance(item, Request) and isinstance(item.message, m.Rewind):
                item.last_step = max(item.last_step, refused.last_step)
                break
        else:
            self._last_step = max(self._last_step, refused.last_step)
        for snapshot in stale:
            self.remove(snapshot)
        return stale

    def resend_from(self, snapshot: Snapshot) -> bool:
        """Send this snapshot and all after it again; False when a later one may have been applied already."""
        index = self._items.index(snapshot)
        later = [item for item in list(self._items)[index + 1 :] if isinstance(item, Snapshot)]
        if any(item.phase is Phase.AWAITING for item in later):
            return False
        for item in (snapshot, *later):
            item.phase, item.sent_bytes = Phase.BEGIN, 0
        return True

    def restart(self) -> None:
        """The connection is gone: nothing counts as written."""
        for item in self._items:
            if isinstance(item, Request):
                item.written = False
            elif isinstance(item, Snapshot):
                item.phase, item.sent_bytes = Phase.BEGIN, 0
        self.credit_limit = self._chunks_sent = 0
        self.files.clear()

    def settle(self, joined: m.Joined) -> list[Snapshot]:
        """Take credit and lane of a JOINED; remove and return the snapshots it answers, `dropped` if not applied."""
        self.credit_limit, self._chunks_sent = joined.credit, 0
        self.is_shared = joined.lane == m.SHM
        last = joined.last_step
        if last is None or joined.continuation == "new":
            return []
        before_rewind: list[Snapshot] = []
        for item in self._items:
            if isinstance(item, Request) and isinstance(item.message, m.Rewind):
                break
            if isinstance(item, Snapshot) and item.step + (item.mode == "set") <= last:
                item.dropped = None if item.step in joined.recent else RejectCode.STEP_PASSED
                before_rewind.append(item)
        for snapshot in before_rewind:
            self.remove(snapshot)
        return before_rewind

    def clear(self) -> list[Snapshot | Request]:
        items = [item for item in self._items if not isinstance(item, Skip)]
        self._items.clear()
        return items
