"""The training thread's end of the session: it hands over filled slots and requests, and waits with a bound.

Comes in: snapshots in slots, and requests. Goes out: whether they succeeded. The connection itself has a thread of its
own, the driver, which this side never touches except through commands.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable

from ema_proto.errors import RejectCode
from ema_proto.limits import SLOTS
from ema_proto.sender.events import Answered
from ema_proto.sender.machine import Sender
from ema_proto.wire import messages as m
from trainer_client.connection.driver import Driver
from trainer_client.connection.link import Link
from trainer_client.connection.shared_state import Shared, WorkerStats
from trainer_client.errors import ConnectError, JoinError, RewindError
from trainer_client.staging.slots import Slot, make_slots

_RESTORE_S = 600.0  # a server that is alive may read averages of 100 GB back from its disk before it answers a JOIN


class Worker:
    """One session with the server.

    Args:
        endpoint: where the server listens for trainers.
        token: shared secret, or None.

    Attributes:
        slots: all of them, once a run is joined and until the worker is closed.
    """

    def __init__(self, endpoint: str, *, token: str | None) -> None:
        self._endpoint = endpoint
        self._shared = Shared()
        self._link = Link(endpoint)
        self._sender = Sender(
            secrets.token_bytes(16), token=token, jitter=random.Random().random
        )  # not the seeded one of the training
        self._driver = Driver(self._sender, self._link, self._shared)
        self._driver.start()
        self.slots: tuple[Slot, ...] = ()

    def greet(self, timeout_s: float) -> None:
        """Wait until the server has accepted the connection.

        Raises:
            ConnectError: nobody answered in time, or version or token were refused.
        """
        shared = self._shared
        with shared.changed:
            shared.wait(lambda: shared.greeted or shared.refused is not None, timeout_s)
            if shared.greeted:
                return
            refused = shared.refused
        if refused is not None:
            raise ConnectError(f"the server at {self._endpoint} refused this client: {refused.text}")
        what = "nothing listens" if self._link.refused else "no ema server answered"
        raise ConnectError(
            f"{what} at {self._endpoint} ({timeout_s:g} s waited): start one with `ema serve`, or correct the endpoint "
            '(EMA_ENDPOINT); it is the address that the server prints as "zmq"'
        )

    def join(self, join: m.Join, timeout_s: float) -> m.Joined:
        """Make the slots and join the run; return the server's answer.

        Args:
            join: what is asked for.
            timeout_s: how long the server may be out of reach meanwhile. One that is there may take longer.

        Raises:
            JoinError: the server refused (`code` says why), did not answer in time, or the slots do not fit in memory.
        """
        try:
            slots = make_slots(join.manifest.nbytes, SLOTS)
        except (OSError, MemoryError) as error:
            text = f"{SLOTS} slots of {join.manifest.nbytes} bytes cannot be had: {error}"
            raise JoinError(text, RejectCode.OUT_OF_MEMORY) from None
        shared = self._shared
        self.slots = slots
        self._driver.lend(slots)
        with shared.changed:
            shared.free = list(slots)
        self._driver.do(lambda _: self._sender.join(join))
        with shared.changed:
            shared.wait(lambda: shared.joined or shared.refused or shared.is_down_for(timeout_s), _RESTORE_S)
            if shared.refused is not None:
                raise JoinError(f"run {join.run!r} was refused: {shared.refused.text}", shared.refused.code)
            if shared.joined is None:
                raise JoinError(f"run {join.run!r}: the server at {self._endpoint} has not answered")
            return shared.joined

    @property
    def continuation(self) -> str | None:
        """How the run went on when the server last answered a JOIN; None before."""
        with self._shared.changed:
            return None if self._shared.joined is None else self._shared.joined.continuation

    def acquire(self, wait_s: float) -> Slot | None:
        """A slot to fill, to be passed to `offer` or `give_back`; None when there is none or the connection is down.

        Waits at most `wait_s` seconds for one, and only while connected.
        """
        shared = self._shared
        with shared.changed:
            if not shared.free and wait_s > 0:
                shared.wait(lambda: shared.free or not shared.streaming, wait_s)
            return shared.free.pop() if shared.free and shared.streaming else None

    def give_back(self, slot: Slot) -> None:
        """Return a slot unused."""
        with self._shared.changed:
            self._shared.free.append(slot)
            self._shared.changed.notify_all()

    def offer(self, slot: Slot, step: int, mode: m.Mode = "update") -> None:
        """Send the snapshot of `step` that `slot` holds. Steps must grow."""
        with self._shared.changed:
            self._shared.in_flight += 1
            self._shared.offered += 1
            self._shared.last_offered = step
        self._driver.do(lambda now: self._sender.offer(slot.index, step, now, mode))

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """Wait until the newest snapshot offered is applied (`durable`: published); False when it is not in time."""
        deadline = time.monotonic() + timeout_s
        shared = self._shared
        with shared.changed:
            newest = shared.last_offered
            shared.wait(lambda: shared.in_flight == 0 or shared.refused is not None, timeout_s)
            if newest is not None and shared.last_committed != newest:
                return False
        return not durable or self._ask_publish(pin=False, timeout_s=deadline - time.monotonic())

    def checkpoint(self, timeout_s: float) -> bool:
        """Publish a generation of everything offered so far, kept beyond the newest ones; False if not in time."""
        return self._ask_publish(pin=True, timeout_s=timeout_s)

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """Take the run back to its newest generation at or before `step`; return that generation's step.

        Raises:
            RewindError: there is none, or the server did not answer in time.
        """
        answer = self._ask(lambda: self._sender.request_rewind(step), timeout_s)
        if answer is None:
            raise RewindError(f"the server at {self._endpoint} did not rewind to step {step} in {timeout_s:g} s")
        if answer.error is not None:
            raise RewindError(answer.error)
        shared = self._shared
        with shared.changed:
            shared.last_offered = shared.last_committed = shared.last_published = answer.step
        return answer.step

    def finish(self, timeout_s: float) -> bool:
        """Publish the run and mark it finished; False when that is not confirmed in time."""
        answer = self._ask(self._sender.request_finish, timeout_s)
        return answer is not None and answer.error is None

    def close(self, timeout_s: float) -> bool:
        """Give snapshots under way at most `timeout_s` seconds, say goodbye, end the driver.

        Returns:
            Whether it has ended. Nobody reads the slots then.
        """
        deadline = time.monotonic() + timeout_s
        shared = self._shared
        with shared.changed:
            if shared.streaming:
                shared.wait(lambda: shared.in_flight == 0 or not shared.streaming, timeout_s)
        self._driver.do(lambda _: self._sender.bye())
        ended = self._driver.stop(max(0.5, deadline - time.monotonic()))
        if ended:
            self.slots, shared.free = (), []
        return ended

    def stats(self) -> WorkerStats:
        """A consistent copy of the counters."""
        with self._shared.changed:
            return self._shared.stats()

    def _ask_publish(self, *, pin: bool, timeout_s: float) -> bool:
        answer = self._ask(lambda: self._sender.request_publish(pin=pin), timeout_s)
        return answer is not None and answer.error is None

    def _ask(self, request: Callable[[], int], timeout_s: float) -> Answered | None:
        pending = self._driver.ask(request)
        with self._shared.changed:
            self._shared.wait(lambda: pending.answer is not None, timeout_s)
        return pending.answer
