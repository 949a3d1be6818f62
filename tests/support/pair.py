"""A sender and a receiver joined in memory by a wire with every fault of networks and restarts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ema_proto.errors import RejectCode
from ema_proto.sender.events import SenderState
from support.memory_server import Server
from support.memory_trainer import Connection, Trainer, shard_manifest, small_manifest

__all__ = ["Connection", "Faults", "Server", "Trainer", "World", "check_agreement"]


@dataclass
class Faults:
    """Probability of each fault, for each message."""

    lose: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    stale: float = 0.0
    unshared: float = 0.0  # for each connection: the slots do not reach the server


class World:
    """A server, trainers, a wire with faults, and a clock. With `shm`, trainers and server share memory."""

    def __init__(self, *, token: str | None = None, rng: random.Random | None = None, shm: bool = False) -> None:
        self.now = 0.0
        self.rng = rng or random.Random(0)
        self.server = Server(token=token, shm="/run/ema/socket" if shm else None)
        self.server.reads_late = shm
        self.trainers: list[Trainer] = []
        self._faults = Faults()

    def trainer(
        self,
        name: str = "a",
        *,
        chunks: float = 3.5,
        token: str | None = None,
        incarnation: int = 0,
        files: Mapping[str, bytes] | None = None,
    ) -> Trainer:
        """Add a trainer."""
        share = None if self.server.shm is None else self._share
        manifest = small_manifest(chunks)
        trainer = Trainer(name, manifest, token=token, incarnation=incarnation, files=files, share=share)
        self.trainers.append(trainer)
        return trainer

    def rank(self, rank: int, world: int, *, incarnation: int = 0, gang: str = "job") -> Trainer:
        """Add one rank of a sharded trainer."""
        name = f"{gang}{incarnation}r{rank}"
        manifest = shard_manifest(rank, world)
        share = None if self.server.shm is None else self._share
        trainer = Trainer(name, manifest, incarnation=incarnation, rank=rank, world=world, gang=gang, share=share)
        self.trainers.append(trainer)
        return trainer

    def turn(self, faults: Faults | None = None, *, seconds: float = 0.05) -> None:
        """Let time pass, then move every message in transit one hop."""
        self.now += seconds
        self._faults = faults or Faults()
        if faults is None or self.rng.random() < 0.5:
            self.server.read()
        for trainer in self.trainers:
            if trainer.sender.state is SenderState.DISCONNECTED and self.now >= trainer.retry_at:
                trainer.open(self.now)
            trainer.sender.tick(self.now)
            trainer.write()
            for connection in trainer.connections:
                self._deliver_up(connection, faults, current=connection is trainer.connection)
        self.server.receiver.tick(self.now)
        self.server.work()
        self._reply()
        for trainer in self.trainers:
            current = trainer.connection
            while current is not None and current.down and current is trainer.connection:
                frames = current.down.popleft()
                for copy in self._mangled(frames, faults):
                    trainer.sender.receive(copy, self.now)
            trainer.settle()

    def run(self, turns: int, *, seconds: float = 0.25) -> None:
        """Let this many turns pass without faults."""
        for _ in range(turns):
            self.turn(seconds=seconds)

    def calm(self, turns: int = 400, *, seconds: float = 0.25) -> None:
        """Run without faults until no message is in transit, or for this many turns."""
        for _ in range(turns):
            self.turn(seconds=seconds)
            busy = any(len(t.free) < 2 and t.sender.state is not SenderState.FAILED for t in self.trainers)
            waiting = any(t.sender.state is SenderState.JOINING for t in self.trainers)
            if not busy and not waiting:
                break
        self.run(4, seconds=seconds)  # answers to requests that waited for the last snapshot

    def _share(self, session: bytes, slots: Sequence[bytes]) -> None:
        if self.rng.random() >= self._faults.unshared:
            self.server.passed[session] = slots

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


def check_agreement(world: World) -> None:
    """Exactly what one session sent was applied, in order and once; both ends agree on the outcome of each step."""
    for life in world.server.lives:
        steps = [step for step, _ in life]
        assert steps == sorted(set(steps))
        for step, content in life:
            assert any((step, content) in trainer.offered for trainer in world.trainers)
    ever_applied, applied = set(world.server.history), set(world.server.applied)
    for trainer in world.trainers:
        for step, content, code in trainer.outcomes:
            if code is None:
                assert (step, content) in ever_applied
            elif code is not RejectCode.UNAVAILABLE:  # dropped without an answer: the outcome is unknown
                assert (step, content) not in applied
