"""Snapshots whose copies from a device go on while training does, in the order of their steps.

A thread waits for each copy and then sends the snapshot. It is joined before the interpreter ends: a thread inside
torch would abort it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto.wire.messages import Mode
from trainer_client.counters import Counters
from trainer_client.staging.slots import Slot
from trainer_client.staging.transfer import AsyncCopy

log = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    slot: Slot
    step: int
    mode: Mode
    transfer: AsyncCopy | None


class TransferQueue:
    """Snapshots that are being copied.

    Args:
        send: takes a slot that is filled, its step and mode.
        give_back: takes a slot that will not be sent.
        skip: takes a step that will not be sent, and why.
        counters: `torn` and `failed` are written here, and nothing else.
    """

    def __init__(
        self,
        send: Callable[[Slot, int, Mode], None],
        give_back: Callable[[Slot], None],
        skip: Callable[[int, str], None],
        counters: Counters,
    ) -> None:
        self._send = send
        self._give_back = give_back
        self._skip = skip
        self._counters = counters
        self._changed = threading.Condition()
        self._waiting: deque[_Snapshot | Callable[[], object]] = deque()  # the first stays until it is done
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lost = False
        self._warned = False

    def put(self, slot: Slot, step: int, mode: Mode, transfer: AsyncCopy | None) -> None:
        """Send what `slot` holds, now or when `transfer` has filled it, after everything that was put before."""
        snapshot = _Snapshot(slot, step, mode, transfer)
        with self._changed:
            if self._waiting or not (transfer is None or transfer.finished):
                self._waiting.append(snapshot)
                self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="ema-copies", daemon=True)
                    self._thread.start()
                return
        self._finish(snapshot)

    def then(self, call: Callable[[], object]) -> None:
        """Call it after everything that was put before was sent: now, or in the thread."""
        with self._changed:
            if self._waiting:
                self._waiting.append(call)
                self._changed.notify_all()
                return
        call()

    def idle(self, timeout_s: float) -> bool:
        """Wait until no copy is under way; whether that is so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, max(0.0, timeout_s))

    def close(self, timeout_s: float) -> bool:
        """Wait as `idle` does, and end the thread; whether no copy can write to a slot after this."""
        idle = self.idle(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and idle:
            self._thread.join(max(1.0, timeout_s))
        return idle and not self._lost

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                first = self._waiting[0]
            if isinstance(first, _Snapshot):
                self._finish(first)
            else:
                first()
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _finish(self, snapshot: _Snapshot) -> None:
        try:
            whole = snapshot.transfer is None or snapshot.transfer.wait()
        # The device's error belongs to the training, which will meet it; here it costs a snapshot.
        except Exception as error:  # noqa: BLE001
            self._counters.failed += 1
            self._lost = self._lost or (snapshot.transfer is not None and snapshot.transfer.lost)
            self._give_back(snapshot.slot)
            self._skip(snapshot.step, "its copy failed")
            log.warning("ema: step %d was not sent, its copy failed: %r", snapshot.step, error)
            return
        if whole:
            self._send(snapshot.slot, snapshot.step, snapshot.mode)
            return
        self._counters.torn += 1
        self._give_back(snapshot.slot)
        self._skip(snapshot.step, "its copy was torn")
        if not self._warned:
            log.warning(
                "ema: step %d was not sent: something other than an optimizer wrote the weights during their copy; "
                "call before_weight_write() before that, or pass overlap=False (logged once, then only counted)",
                snapshot.step,
            )
        self._warned = True
