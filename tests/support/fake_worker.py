"""A worker that keeps what it is given instead of sending it: for the client's own logic, without sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ema_proto.wire.messages import Join, Joined
from support.snapshots import decode
from trainer_client import EmaClient
from trainer_client.connection.shared_state import WorkerStats
from trainer_client.connection.worker import Worker
from trainer_client.errors import JoinError, RewindError
from trainer_client.session import Session
from trainer_client.settings import Settings
from trainer_client.staging.slots import Slot, make_slots


class FakeWorker(Worker):
    """Offered slots stay in `offered` until `commit()`; the knobs say what the server would answer."""

    def __init__(self, slots: int = 2) -> None:
        self.slots_count = slots
        self.slots: tuple[Slot, ...] = ()
        self.state = "greeted"
        self.refuse: JoinError | None = None
        self.rewind_to: int | None = None
        self.answer = True
        self.joins: list[Join] = []
        self.free: list[Slot] = []
        self.offered: list[tuple[int, Slot]] = []
        self.waits: list[float] = []
        self.asked: list[str] = []
        self.closed = 0
        self.when_closed: Callable[[float], None] = lambda timeout_s: None

    def greet(self, timeout_s: float) -> None:
        self.asked.append("greet")

    def join(self, join: Join, timeout_s: float) -> Joined:
        if self.refuse is not None:
            raise self.refuse
        self.joins.append(join)
        self.slots = make_slots(join.manifest.nbytes, self.slots_count)
        self.free = list(self.slots)
        self.state = "streaming"
        return Joined(last_step=None, published_step=None, recent=(), continuation="new", credit=8)

    def acquire(self, wait_s: float) -> Slot | None:
        self.waits.append(wait_s)
        return self.free.pop() if self.free and self.state == "streaming" else None

    def give_back(self, slot: Slot) -> None:
        self.free.append(slot)

    def offer(self, slot: Slot, step: int, mode: Literal["update", "set"] = "update") -> None:
        self.offered.append((step, slot))

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        self.asked.append(f"flush durable={durable}")
        return self.answer

    def checkpoint(self, timeout_s: float) -> bool:
        self.asked.append("checkpoint")
        return self.answer

    def rewind(self, step: int, timeout_s: float) -> int | None:
        self.asked.append(f"rewind {step}")
        if self.rewind_to is None:
            raise RewindError("no generation")
        return self.rewind_to

    def finish(self, timeout_s: float) -> bool:
        self.asked.append("finish")
        return self.answer

    def close(self, timeout_s: float) -> bool:
        self.when_closed(timeout_s)
        self.closed += 1
        self.state = "closed"
        return True

    def stats(self) -> WorkerStats:
        last = self.offered[-1][0] if self.offered else None
        return WorkerStats(self.state, len(self.offered), 0, {}, 0, last, None, None)

    @property
    def steps(self) -> list[int]:
        """Steps offered so far."""
        return [step for step, _ in self.offered]

    def sent(self, index: int) -> dict[str, Tensor]:
        """The tensors that lie in the slot of the offer with that index, read now."""
        return decode(self.joins[-1].manifest, self.offered[index][1].view)


class OfflineClient(EmaClient):
    """An EmaClient on a FakeWorker."""

    @staticmethod
    def _open(settings: Settings) -> Session:
        worker = FakeWorker(slots=64)
        worker.greet(settings.connect_timeout_s)
        return Session(settings, worker)

    @property
    def worker(self) -> FakeWorker:
        """What stands in for the connection."""
        worker = self._session.worker
        assert isinstance(worker, FakeWorker)
        return worker
