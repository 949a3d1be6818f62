"""A worker that records snapshots and requests instead of sending them, to test the client without sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ema_proto.sender.events import Answered
from ema_proto.wire.messages import Join, Joined, Mode
from support.snapshots import decode
from trainer_client import EmaClient
from trainer_client.connection.shared_state import Shared, WorkerStats
from trainer_client.connection.transfers import TransferQueue
from trainer_client.connection.worker import Worker
from trainer_client.counters import Counters
from trainer_client.errors import JoinError
from trainer_client.settings import Settings
from trainer_client.staging.device import DeviceOf, device_of
from trainer_client.staging.slots import Pins, Slot, make_slots


class FakeWorker(Worker):
    """Offered slots stay in `offered` until `commit()`; the other attributes set the server's answers."""

    def __init__(self, slots: int = 2, device_of: DeviceOf = device_of) -> None:
        self.counters = Counters()
        self.device_of = device_of
        self.pins = Pins()
        self._copies = TransferQueue(self._send, self.give_back, lambda step, why: None, self.counters)
        self.slots_count = slots
        self.slots: tuple[Slot, ...] = ()
        self.state = "greeted"
        self.refuse: JoinError | None = None
        self.rewind_to: int | None = None
        self.answer = True
        self.warning: str | None = None
        self.joins: list[Join] = []
        self.free: list[Slot] = []
        self.offered: list[tuple[int, Slot]] = []
        self.waits: list[float] = []
        self.asked: list[str] = []
        self._answers: list[Answered] = []
        self._shared = Shared()
        self.closed = 0
        self.when_closed: Callable[[float], None] = lambda timeout_s: None

    def greet(self, timeout_s: float) -> None:
        self.asked.append("greet")

    def join(self, join: Join, timeout_s: float, files: tuple[bytes, ...] = ()) -> Joined:
        if self.refuse is not None:
            raise self.refuse
        self.joins.append(join)
        self.slots = make_slots(join.manifest.nbytes, self.slots_count)
        self.free = list(self.slots)
        self.state = "streaming"
        return Joined(last_step=None, published_step=None, recent=(), continuation="new", credit=8)

    def watch(self, look: Callable[[float], None]) -> None:
        self.look = look

    def acquire(self, wait_s: float, *, reconnecting: bool = False) -> Slot | None:
        self.waits.append(wait_s)
        return self.free.pop() if self.free and self.state == "streaming" else None

    def give_back(self, slot: Slot) -> None:
        self.free.append(slot)

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        if not self._copies.idle(timeout_s):
            return False
        self.asked.append(f"flush durable={durable}")
        return self.answer

    def publish_soon(self) -> None:
        self.asked.append("publish soon")

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        self.offered.append((step, slot))

    def _request(self, request: Callable[[Any], int], timeout_s: float) -> Answered:
        answer = self._answers[request(self)]
        return answer if self.answer else Answered(0, None, "no answer")

    def request_publish(self, *, pin: bool) -> int:
        """As of a `Sender`, which requests are made of; likewise the next two."""
        return self._answered("checkpoint" if pin else "publish", self._last_step)

    def request_finish(self) -> int:
        return self._answered("finish", self._last_step)

    def request_rewind(self, step: int) -> int:
        error = "no generation" if self.rewind_to is None else None
        return self._answered(f"rewind {step}", self.rewind_to, error)

    def _answered(self, request: str, step: int | None, error: str | None = None) -> int:
        self.asked.append(request)
        self._answers.append(Answered(0, step, error, self.warning))
        return len(self._answers) - 1

    @property
    def _last_step(self) -> int | None:
        return self.offered[-1][0] if self.offered else None

    def _disconnect(self, timeout_s: float) -> bool:
        self.when_closed(timeout_s)
        self.closed += 1
        self.state = "closed"
        return True

    def stats(self) -> WorkerStats:
        return WorkerStats(self.state, len(self.offered), 0, {}, 0, self._last_step, None, None)

    @property
    def steps(self) -> list[int]:
        """Steps offered so far."""
        return [step for step, _ in self.offered]

    def sent(self, index: int) -> dict[str, Tensor]:
        """The current tensors in the slot of the offer with that index."""
        return decode(self.joins[-1].manifest, self.offered[index][1].view)


class OfflineClient(EmaClient):
    """An EmaClient on a FakeWorker."""

    @staticmethod
    def _connect(settings: Settings) -> FakeWorker:
        worker = FakeWorker(slots=64)
        worker.greet(settings.connect_timeout_s)
        return worker

    @property
    def worker(self) -> FakeWorker:
        """The worker in place of the connection."""
        assert self._session is not None
        assert isinstance(self._session.worker, FakeWorker)
        return self._session.worker


class KeepingWorker(FakeWorker):
    """Keeps a copy of each snapshot, by step, and releases its slot."""

    def __init__(self) -> None:
        super().__init__(slots=2)
        self.snapshots: dict[int, dict[str, Tensor]] = {}

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        self.snapshots[step] = decode(self.joins[-1].manifest, slot.view)
        super()._send(slot, step, mode)
        self.give_back(slot)


def client_of(worker: FakeWorker, **given: Any) -> EmaClient:
    """A client on this worker."""

    class Client(EmaClient):
        @staticmethod
        def _connect(settings: Settings) -> FakeWorker:
            return worker

    return Client("tcp://127.0.0.1:5555", run="r", **given)
