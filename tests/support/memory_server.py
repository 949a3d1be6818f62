"""A receiver with a minimal model of a core: the applied snapshots, and a durable copy of their list.

A restart falls back to the durable copy. `files` has the companion files that are whole, by sha256; with `damages`, the
next one arrives damaged. `refusal` and `quarantine` are the core's answers to the next JOIN and the next snapshot. With
`shm`, slots can be passed; `reads_late` leaves the snapshots in them to `read`. It is used by tests only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from hashlib import sha256

from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN, RECENT_STEPS
from ema_proto.receiver import events as e
from ema_proto.receiver import machine as r
from ema_proto.wire import messages as m

CHUNK_BYTES = CHUNK_BYTES_MIN


class Server:
    """A receiver with slots and a minimal core; `restart` drops what was not durable."""

    def __init__(self, *, token: str | None = None, shm: str | None = None) -> None:
        self.token = token
        self.shm = shm
        self.reads_late = False
        self.refusal: tuple[RejectCode, str] | None = None
        self.quarantine: str | None = None
        self.damages = False
        self.files: dict[str, bytes] = {}
        self.lives: list[list[tuple[int, bytes]]] = [[]]
        self.history: list[tuple[int, bytes]] = []
        self.durable: list[tuple[int, bytes]] = []
        self.dropped: list[tuple[int, int, str]] = []  # step, rank, reason
        self.missing: list[tuple[int, ...]] = []
        self.restart()

    def restart(self) -> None:
        """Start a new process on the durable state."""
        self.epoch = len(self.lives) + 1
        self.lives.append(list(self.durable))
        self.receiver = r.Receiver(
            epoch=self.epoch,
            token=self.token,
            nonce=lambda: "nonce",
            chunk_bytes=CHUNK_BYTES,
            lost_after_s=60.0,
            shm=self.shm,
        )
        self.passed: dict[bytes, Sequence[bytes]] = {}  # by session: the slots of trainers, as they are now
        self.shared: dict[int, dict[int, Sequence[bytes]]] = {}  # the same by ticket and rank
        self.unread: deque[e.SnapshotReady | e.PartReady] = deque()
        self.parts: dict[int, bytes] = {}
        self.slots: dict[int, list[list[bytearray]]] = {}  # by ticket, slot and rank

    @property
    def applied(self) -> list[tuple[int, bytes]]:
        """Step and bytes of each snapshot applied, in order."""
        return self.lives[-1]

    @property
    def last_step(self) -> int | None:
        """The last applied step."""
        return self.applied[-1][0] if self.applied else None

    def take(self, peer: bytes, frames: tuple[bytes, ...], now: float) -> None:
        """Receive one message from a trainer, as the ingest thread does."""
        match self.receiver.header(peer, frames[0], now):
            case e.Payload() as target:
                part = self.slots[target.ticket][target.slot][target.rank]
                view = memoryview(part)[target.offset : target.offset + target.length]
                body = frames[1] if len(frames) == 2 else b""
                view[: min(len(body), len(view))] = body[: len(view)]
                self.receiver.payload(view if len(body) == len(view) else None)
            case e.FileBody():
                self.receiver.file_payload(frames[1] if len(frames) == 2 else None)
            case e.Control():
                self.receiver.control(frames[1] if len(frames) == 2 else b"")
            case e.Discard():
                pass

    def work(self) -> None:
        """Answer all events of the machine as a core would."""
        while self.receiver.events:
            event = self.receiver.events.popleft()
            match event:
                case e.JoinRequested() if self.refusal is not None:
                    self.receiver.refuse_join(event.run, event.ticket, *self.refusal)
                    self.refusal = None
                case e.JoinRequested():
                    self._join(event)
                case e.FileReceived():
                    self._store(event)
                case e.SnapshotReady() if self.quarantine is not None:
                    self.receiver.quarantined(event.run, event.ticket, event.slot, self.quarantine)
                    self.quarantine = None
                case e.SnapshotReady() | e.PartReady():
                    self.unread.append(event)
                    if not self.reads_late:
                        self.read()
                case e.PublishRequested():
                    self.publish()
                    self.receiver.publish_answered(
                        event.run, event.ticket, event.request, self.last_step, rank=event.rank
                    )
                case e.RewindRequested():
                    self._rewind(event)
                case e.FinishRequested():
                    self.publish()
                    self.receiver.finished(event.run, event.ticket, event.request, self.last_step)
                case e.StepDropped():
                    self.dropped.append((event.step, event.rank, event.reason))
                case e.RanksMissing():
                    self.missing.append(event.ranks)
                case e.SessionEnded():
                    pass

    def read(self) -> None:
        """Copy the parts, and apply the snapshots, that are committed."""
        while self.unread:
            event = self.unread.popleft()
            if isinstance(event, e.PartReady):
                part = self.slots[event.ticket][event.slot][event.rank]
                part[:] = self.shared[event.ticket][event.rank][event.source][: len(part)]
                self.receiver.copied(event)
                continue
            if event.source is None:
                content = b"".join(self.slots[event.ticket][event.slot])
            else:
                content = self.shared[event.ticket][0][event.source]
            if self.last_step is None or event.step > self.last_step:
                self.applied.append((event.step, content))
                self.history.append(self.applied[-1])
            self.receiver.applied(event.run, event.ticket, event.slot)

    def _store(self, event: e.FileReceived) -> None:
        known = self.parts.pop(event.ticket, b"") if event.offset else b""
        assert len(known) == event.offset
        data = self.parts[event.ticket] = known + event.payload
        if len(data) == event.file.nbytes:
            if self.damages or sha256(data).hexdigest() != event.file.sha256:
                self.damages = False
                self.receiver.failed(event.run, event.ticket, f"file {event.file.name!r} arrived damaged")
                return
            self.files[event.file.sha256] = data
        self.receiver.file_stored(event.run, event.ticket)

    def publish(self) -> None:
        """Make what is applied durable."""
        self.durable = list(self.applied)
        if self.last_step is not None:
            self.receiver.published("run", self.last_step)

    def _recent(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.applied[-RECENT_STEPS:])

    def _rewind(self, event: e.RewindRequested) -> None:
        error = None
        if any(step <= event.step for step, _ in self.durable):
            self._go_back(event.step)
        else:
            error = f"no generation at or before step {event.step}"
        step, recent = (self.last_step, self._recent()) if error is None else (None, ())
        self.receiver.rewound(event.run, event.ticket, event.request, step, recent=recent, error=error)

    def _go_back(self, step: int) -> None:
        self.lives[-1] = [item for item in self.durable if item[0] <= step]
        self.durable = list(self.lives[-1])

    def _join(self, event: e.JoinRequested) -> None:
        self.unread.clear()  # of earlier sessions
        passed = {rank: self.passed.pop(session, ()) for rank, session in enumerate(event.sessions)}
        shared = self.shared[event.ticket] = {rank: slots for rank, slots in passed.items() if slots}
        last = self.last_step
        if not event.join.reconnect and last is not None and event.join.first_step <= last:
            self._go_back(event.join.first_step - 1)
        self.slots[event.ticket] = [[bytearray(part.nbytes) for part in event.parts] for _ in range(2)]
        continuation: m.Continuation = "new"
        if last is not None:
            continuation = "continued" if self.last_step == last else "rewound"
        self.receiver.accept_join(
            event.run,
            event.ticket,
            last_step=self.last_step,
            published_step=self.durable[-1][0] if self.durable else None,
            recent=self._recent(),
            continuation=continuation,
            missing_files=tuple(
                dict.fromkeys(file.sha256 for file in event.join.files or () if file.sha256 not in self.files)
            ),
            shared={rank: len(slots) for rank, slots in shared.items() if event.parts[rank].nbytes},
            reads_in_place=len(event.parts) == 1,
        )
