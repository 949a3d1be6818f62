"""A sender and a receiver joined in memory by a wire that can do everything a network and restarting processes can do.

The server side keeps the smallest honest model of a keeper: a list of applied snapshots, and a durable copy of it that a
restart falls back to. Nothing here is used by the product.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

from ema_proto import events as e
from ema_proto import messages as m
from ema_proto import receiver as r
from ema_proto import sender as s
from ema_proto.codec import with_crc32
from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN, RECENT_STEPS
from ema_proto.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.specs import Ema

CHUNK_BYTES = CHUNK_BYTES_MIN
Frames = tuple[bytes, bytes]


def small_manifest(chunks: float = 3.5) -> Manifest:
    """One tensor of bytes that takes this many chunks."""
    return layout([TensorSpec("weight", "U8", (int(chunks * CHUNK_BYTES),), Role.PARAM, 0)])


def small_join(manifest: Manifest, *, first_step: int = 1, incarnation: int = 0, checksum: bool = True) -> m.Join:
    """A JOIN for the run of these tests."""
    return m.Join(
        run="run",
        first_step=first_step,
        manifest=manifest,
        averages=(Ema(0.9),),
        incarnation=incarnation,
        checksum=checksum,
    )


@dataclass
class Faults:
    """Probability of each fault, for each message."""

    lose: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    stale: float = 0.0


class Server:
    """A receiver with slots and the simplest keeper; `restart` forgets what was not durable."""

    def __init__(self, *, token: str | None = None) -> None:
        self.token = token
        self.lives: list[list[tuple[int, bytes]]] = [[]]
        self.history: list[tuple[int, bytes]] = []
        self.durable: list[tuple[int, bytes]] = []
        self.restart()

    def restart(self) -> None:
        """A new process on the durable state."""
        self.epoch = len(self.lives) + 1
        self.lives.append(list(self.durable))
        self.receiver = r.Receiver(
            epoch=self.epoch, token=self.token, nonce=lambda: "nonce", chunk_bytes=CHUNK_BYTES, lost_after_s=60.0
        )
        self.slots: dict[int, list[bytearray]] = {}

    @property
    def applied(self) -> list[tuple[int, bytes]]:
        """Step and bytes of each snapshot applied, in order."""
        return self.lives[-1]

    @property
    def last_step(self) -> int | None:
        """The last applied step."""
        return self.applied[-1][0] if self.applied else None

    def take(self, peer: bytes, frames: tuple[bytes, ...], now: float) -> None:
        """One message from a trainer, as the ingest thread would take it."""
        match self.receiver.header(peer, frames[0], now):
            case r.Payload() as target:
                view = memoryview(self.slots[target.ticket][target.slot])[target.offset : target.offset + target.length]
                body = frames[1] if len(frames) == 2 else b""
                view[: min(len(body), len(view))] = body[: len(view)]
                self.receiver.payload(view if len(body) == len(view) else None)
            case r.Control():
                self.receiver.control(frames[1] if len(frames) == 2 else b"")
            case r.Discard():
                pass

    def work(self) -> None:
        """Answer everything that the machine asks of the keeper."""
        while self.receiver.events:
            event = self.receiver.events.popleft()
            match event:
                case e.JoinRequested():
                    self._join(event)
                case e.SnapshotReady():
                    self.applied.append((event.step, bytes(self.slots[event.ticket][event.slot])))
                    self.history.append(self.applied[-1])
                    self.receiver.applied(event.run, event.ticket, event.slot)
                case e.PublishRequested():
                    self.publish()
                    self.receiver.publish_answered(event.run, event.ticket, event.request, self.last_step)
                case e.RewindRequested():
                    self._go_back(event.step)
                    self.receiver.rewound(event.run, event.ticket, event.request, self.last_step, recent=self._recent())
                case e.FinishRequested():
                    self.publish()
                    self.receiver.finished(event.run, event.ticket, event.request, self.last_step)
                case e.SessionEnded():
                    pass

    def publish(self) -> None:
        """Make what is applied durable."""
        self.durable = list(self.applied)
        if self.last_step is not None:
            self.receiver.published("run", self.last_step)

    def _recent(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.applied[-RECENT_STEPS:])

    def _go_back(self, step: int) -> None:
        self.lives[-1] = [item for item in self.durable if item[0] <= step]
        self.durable = list(self.lives[-1])

    def _join(self, event: e.JoinRequested) -> None:
        last = self.last_step
        if not event.join.reconnect and last is not None and event.join.first_step <= last:
            self._go_back(event.join.first_step - 1)
        self.slots[event.ticket] = [bytearray(event.join.manifest.nbytes) for _ in range(2)]
        continuation: m.Continuation = "continued" if self.applied else "new"
        self.receiver.accept_join(
            event.run,
            event.ticket,
            last_step=self.last_step,
            published_step=self.durable[-1][0] if self.durable else None,
            recent=self._recent(),
            continuation=continuation,
        )


@dataclass
class Connection:
    """One transport: messages under way in both directions. Old ones linger, and may still deliver."""

    peer: bytes
    up: deque[tuple[bytes, ...]] = field(default_factory=deque)
    down: deque[tuple[bytes, ...]] = field(default_factory=deque)


class Trainer:
    """A sender with two slots; records what it offered and what became of it."""

    def __init__(self, name: str, manifest: Manifest, *, token: str | None = None, incarnation: int = 0) -> None:
        self.name = name
        self.manifest = manifest
        self.sender = s.Sender(name.encode().ljust(16, b"."), token=token, jitter=lambda: 0.5)
        self.slots = [bytes(manifest.nbytes)] * 2
        self.free = [0, 1]
        self.sent: dict[int, bytes] = {}
        self.committed: set[int] = set()
        self.dropped: dict[int, RejectCode] = {}
        self.answers: list[s.Answered] = []
        self.refused: s.Refused | None = None
        self.joined: list[m.Joined] = []
        self.published: list[int] = []
        self.connections: list[Connection] = []
        self.retry_at = 0.0
        self.step = 0
        self.sender.join(small_join(manifest, incarnation=incarnation))

    @property
    def connection(self) -> Connection | None:
        """The current transport."""
        lost = self.sender.state in (s.SenderState.DISCONNECTED, s.SenderState.FAILED)
        return self.connections[-1] if self.connections and not lost else None

    def open(self, now: float) -> None:
        """Connect anew."""
        self.connections.append(Connection(f"{self.name}-{len(self.connections)}".encode()))
        self.sender.opened(now)

    def train(self, now: float) -> bool:
        """One optimizer step; its snapshot is offered if a slot is free."""
        if not self.free or self.sender.state is s.SenderState.FAILED:
            return False
        self.step += 1
        slot = self.free.pop()
        content = random.Random(f"{self.name}-{self.step}-{len(self.sent)}").randbytes(self.manifest.nbytes)
        self.slots[slot] = content
        self.sent[self.step] = content
        self.sender.offer(slot, self.step, now)
        return True

    def write(self) -> None:
        """Put everything that the machine wants to say on the wire."""
        while (out := self.sender.next_frame()) is not None:
            connection = self.connections[-1]
            if out.payload is None:
                connection.up.append((out.header, out.body))
                continue
            payload = out.payload
            body = self.slots[payload.slot][payload.offset : payload.offset + payload.length]
            header = out.header
            if out.checksum:
                header = with_crc32(header, crc32(body))
            connection.up.append((header, body))

    def settle(self) -> None:
        """Take the machine's events."""
        while self.sender.events:
            event = self.sender.events.popleft()
            match event:
                case s.SnapshotDone(slot, step, code, _):
                    self.free.append(slot)
                    if code is None:
                        self.committed.add(step)
                    else:
                        self.dropped[step] = code
                case s.ConnectionLost(_, retry_at):
                    self.retry_at = retry_at
                case s.Answered():
                    self.answers.append(event)
                case s.Refused():
                    self.refused = event
                case s.JoinAccepted(joined):
                    self.joined.append(joined)
                case s.PublishedAt(step):
                    self.published.append(step)
                case s.Greeted():
                    pass


class World:
    """A server, trainers, a wire with faults, and a clock."""

    def __init__(self, *, token: str | None = None, rng: random.Random | None = None) -> None:
        self.now = 0.0
        self.rng = rng or random.Random(0)
        self.server = Server(token=token)
        self.trainers: list[Trainer] = []

    def trainer(
        self, name: str = "a", *, chunks: float = 3.5, token: str | None = None, incarnation: int = 0
    ) -> Trainer:
        """Add a trainer."""
        trainer = Trainer(name, small_manifest(chunks), token=token, incarnation=incarnation)
        self.trainers.append(trainer)
        return trainer

    def turn(self, faults: Faults | None = None, *, seconds: float = 0.05) -> None:
        """Let time pass, then move every message that is under way one hop."""
        self.now += seconds
        for trainer in self.trainers:
            if trainer.sender.state is s.SenderState.DISCONNECTED and self.now >= trainer.retry_at:
                trainer.open(self.now)
            trainer.sender.tick(self.now)
            trainer.write()
            for connection in trainer.connections:
                current = connection is trainer.connection
                self._deliver_up(connection, faults, current=current)
        self.server.receiver.tick(self.now)
        self.server.work()
        self._reply()
        for trainer in self.trainers:
            connection = trainer.connection
            while connection is not None and connection.down and connection is trainer.connection:
                frames = connection.down.popleft()
                for copy in self._mangled(frames, faults):
                    trainer.sender.receive(copy, self.now)
            trainer.settle()

    def run(self, turns: int, *, seconds: float = 0.25) -> None:
        """Let this many turns pass without faults."""
        for _ in range(turns):
            self.turn(seconds=seconds)

    def calm(self, turns: int = 400, *, seconds: float = 0.25) -> None:
        """No more faults: run until nothing is under way, or for this many turns."""
        for _ in range(turns):
            self.turn(seconds=seconds)
            busy = any(len(t.free) < 2 and t.sender.state is not s.SenderState.FAILED for t in self.trainers)
            waiting = any(t.sender.state is s.SenderState.JOINING for t in self.trainers)
            if not busy and not waiting:
                return

    def _deliver_up(self, connection: Connection, faults: Faults | None, *, current: bool) -> None:
        if not current and (faults is None or self.rng.random() >= faults.stale):
            return
        if faults is not None and len(connection.up) > 1 and self.rng.random() < faults.reorder:
            connection.up.rotate(1)
        while connection.up:
            for copy in self._mangled(connection.up.popleft(), faults):
                self.server.take(connection.peer, copy, self.now)
                self.server.work()
                self._reply()
            if faults is not None and self.rng.random() < 0.2:
                return

    def _reply(self) -> None:
        connections = {connection.peer: connection for t in self.trainers for connection in t.connections}
        while self.server.receiver.outbox:
            peer, frames = self.server.receiver.outbox.popleft()
            if peer in connections:
                connections[peer].down.append(frames)

    def _mangled(self, frames: tuple[bytes, ...], faults: Faults | None) -> list[tuple[bytes, ...]]:
        if faults is None:
            return [frames]
        if self.rng.random() < faults.lose:
            return []
        if self.rng.random() < faults.truncate:
            which = self.rng.randrange(len(frames))
            cut = frames[which][: self.rng.randrange(len(frames[which]) + 1)]
            frames = (*frames[:which], cut, *frames[which + 1 :])
        return [frames, frames] if self.rng.random() < faults.double else [frames]
