"""A sender with two slots of random bytes; it records what it offered and the answers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from zlib import crc32

from ema_proto.averages.rules import Ema
from ema_proto.errors import RejectCode
from ema_proto.sender import events as e
from ema_proto.sender import machine as s
from ema_proto.sender.events import SenderState
from ema_proto.sender.file_queue import FilePayload
from ema_proto.wire import messages as m
from ema_proto.wire.boxes import Box
from ema_proto.wire.codec import with_crc32
from ema_proto.wire.files import FileSpec
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.wire.parts import from_ranges, part_of
from support.memory_server import CHUNK_BYTES


def small_manifest(chunks: float = 3.5) -> Manifest:
    """One tensor of bytes that takes this many chunks."""
    return layout([TensorSpec("weight", "U8", (int(chunks * CHUNK_BYTES),), Role.PARAM, 0)])


def shard_manifest(rank: int, world: int) -> Manifest:
    """What one of several ranks holds: a block of rows, of which the last rank has fewer, and a buffer."""
    rows = 2 * world - 1
    low, high = 2 * rank, min(2 * rank + 2, rows)
    columns = CHUNK_BYTES // 2
    weight = TensorSpec("weight", "U8", (rows, columns), Role.PARAM, 0, box=Box((low, 0), (high - low, columns)))
    return layout([weight, TensorSpec("count", "I64", (), Role.BUFFER, 0)])


def small_join(
    manifest: Manifest,
    *,
    first_step: int = 1,
    incarnation: int = 0,
    checksum: bool = True,
    files: tuple[FileSpec, ...] | None = None,
    rank: int = 0,
    world: int = 1,
    gang: str | None = None,
) -> m.Join:
    """A JOIN for the run of these tests."""
    return m.Join(
        run="run",
        first_step=first_step,
        manifest=manifest,
        averages=(Ema(0.9),),
        incarnation=incarnation,
        checksum=checksum,
        files=files,
        rank=rank,
        world=world,
        gang=gang,
    )


def specs_of(files: Mapping[str, bytes]) -> tuple[FileSpec, ...]:
    """Names, sizes and digests of companion files."""
    return tuple(FileSpec(name, len(data), sha256(data).hexdigest()) for name, data in files.items())


@dataclass
class Connection:
    """One transport: messages in transit in both directions. Old transports may still deliver messages."""

    peer: bytes
    up: deque[tuple[bytes, ...]] = field(default_factory=deque)
    down: deque[tuple[bytes, ...]] = field(default_factory=deque)


class Trainer:
    """A sender with two slots; records what it offered and the outcome.

    With `files`, it supports companion files; with `share`, shared memory: it is called with the session and the slots
    when the server takes them.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        *,
        token: str | None = None,
        incarnation: int = 0,
        first_step: int = 1,
        files: Mapping[str, bytes] | None = None,
        rank: int = 0,
        world: int = 1,
        gang: str | None = None,
        share: Callable[[bytes, Sequence[bytes]], None] | None = None,
    ) -> None:
        self.name = name
        self._session = name.encode().ljust(16, b".")
        self._share = share
        self.manifest = manifest
        self.files = [] if files is None else list(files.values())
        self.sender = s.Sender(
            self._session,
            token=token,
            jitter=lambda: 0.5,
            capabilities=("crc32", *(("files",) if files is not None else ()), *(("shm",) if share else ())),
        )
        self.slots = [bytes(manifest.nbytes)] * 2
        self.free = [0, 1]
        self.sent: dict[int, bytes] = {}
        self.offered: set[tuple[int, bytes]] = set()
        self.outcomes: list[tuple[int, bytes, RejectCode | None]] = []
        self.committed: set[int] = set()
        self.dropped: dict[int, RejectCode] = {}
        self.answers: list[e.Answered] = []
        self.refused: e.Refused | None = None
        self.joined: list[m.Joined] = []
        self.published: list[int] = []
        self.connections: list[Connection] = []
        self.retry_at = 0.0
        self._step_before_rewind: dict[int, int] = {}
        self.step = first_step - 1
        specs = None if files is None else specs_of(files)
        self._part_bytes = manifest.nbytes
        self.sender.join(
            small_join(
                manifest,
                first_step=first_step,
                incarnation=incarnation,
                files=specs,
                rank=rank,
                world=world,
                gang=gang,
            )
        )

    @property
    def connection(self) -> Connection | None:
        """The current transport."""
        lost = self.sender.state in (SenderState.DISCONNECTED, SenderState.FAILED)
        return self.connections[-1] if self.connections and not lost else None

    def open(self, now: float) -> None:
        """Open a new connection."""
        self.connections.append(Connection(f"{self.name}-{len(self.connections)}".encode()))
        self.sender.opened(now)

    def train(self, now: float) -> bool:
        """One optimizer step; its snapshot is offered if a slot is free."""
        if not self.free or self.sender.state is SenderState.FAILED:
            return False
        self.step += 1
        slot = self.free.pop()
        content = random.Random(f"{self.name}-{self.step}-{len(self.offered)}").randbytes(self._part_bytes)
        self.offered.add((self.step, content))
        self.slots[slot] = content
        self.sent[self.step] = content
        self.sender.offer(slot, self.step, now)
        return True

    def part(self, step: int) -> bytes | None:
        """What was sent of a step; steps before JOINED were offered with all that the rank holds."""
        return self.sent[step][: self._part_bytes] if step in self.sent else None

    def skip(self) -> None:
        """One optimizer step whose snapshot is not offered."""
        self.step += 1
        self.sender.skip(self.step, "no slot is free")

    def rewind(self, step: int) -> None:
        """Rewind at once: later steps wait for the answer."""
        self._step_before_rewind[self.sender.request_rewind(step)] = self.step
        self.step = step

    def _take_answer(self, number: int, error: str | None) -> None:
        before = self._step_before_rewind.pop(number, None)
        if before is None or error is None:
            return
        if self._step_before_rewind:  # a later rewind decides
            later = min(self._step_before_rewind)
            self._step_before_rewind[later] = max(self._step_before_rewind[later], before)
        else:
            self.step = max(self.step, before)

    def write(self) -> None:
        """Send all messages of the machine."""
        while (out := self.sender.next_frame()) is not None:
            connection = self.connections[-1]
            if out.payload is None:
                connection.up.append((out.header, out.body))
                continue
            payload = out.payload
            source = self.files[payload.file] if isinstance(payload, FilePayload) else self.slots[payload.slot]
            body = source[payload.offset : payload.offset + payload.length]
            header = out.header
            if out.checksum:
                header = with_crc32(header, crc32(body))
            connection.up.append((header, body))

    def settle(self) -> None:
        """Take the machine's events."""
        while self.sender.events:
            event = self.sender.events.popleft()
            match event:
                case e.SnapshotDone(slot, step, code, _):
                    self.free.append(slot)
                    self.outcomes.append((step, self.slots[slot], code))
                    if code is None:
                        self.committed.add(step)
                    else:
                        self.dropped[step] = code
                case e.ConnectionLost(_, retry_at):
                    self.retry_at = retry_at
                case e.Answered(number, _, error):
                    self.answers.append(event)
                    self._take_answer(number, error)
                case e.Refused():
                    self.refused = event
                case e.JoinAccepted(joined):
                    self.joined.append(joined)
                    if joined.send is not None:
                        indices = from_ranges(joined.send, len(self.manifest.tensors))
                        self._part_bytes = part_of(self.manifest, indices).nbytes
                case e.PublishedAt(step):
                    self.published.append(step)
                case e.Greeted(_, shm):
                    if shm is not None and self._share is not None:
                        self._share(self._session, self.slots)
