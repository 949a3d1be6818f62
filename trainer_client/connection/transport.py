"""What a session's snapshots go through, in this order: a copy into a slot, the worker, the server.

Comes in: filled or filling slots, and requests. Goes out: the same to the worker, once the copies before them are done:
what is asked of the server is asked about all that was taken. Knows no model; decides nothing.
"""

from __future__ import annotations

import time

from ema_proto.wire.messages import Mode
from trainer_client.connection.transfers import TransferQueue
from trainer_client.connection.worker import Worker
from trainer_client.counters import Counters
from trainer_client.errors import RewindError
from trainer_client.staging.device import DeviceOf
from trainer_client.staging.slots import Pins, Slot
from trainer_client.staging.transfer import AsyncCopy


class Transport:
    """A worker, the copies before it, and the memory that both use.

    Args:
        worker: connected.
        counters: told of copies that failed.
        device_of: the device behind a torch device, None where copies cannot go on while training does.
    """

    def __init__(self, worker: Worker, counters: Counters, device_of: DeviceOf) -> None:
        self.worker = worker
        self.device_of = device_of
        self.pins = Pins()
        self._copies = TransferQueue(worker, counters)

    def offer(self, transfer: AsyncCopy | None, slot: Slot, step: int, mode: Mode) -> None:
        """Send the snapshot of `step` that `slot` holds, or will once `transfer` has filled it. Steps must grow."""
        self._copies.hand_over(transfer, slot, step, mode)

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """See `Worker.flush`; False also when a copy does not end in time."""
        deadline = time.monotonic() + timeout_s
        return self._copies.idle(timeout_s) and self.worker.flush(seconds_left(deadline), durable=durable)

    def checkpoint(self, timeout_s: float) -> bool:
        """See `Worker.checkpoint`; False also when a copy does not end in time."""
        deadline = time.monotonic() + timeout_s
        return self._copies.idle(timeout_s) and self.worker.checkpoint(seconds_left(deadline))

    def finish(self, timeout_s: float) -> bool:
        """See `Worker.finish`; False also when a copy does not end in time."""
        deadline = time.monotonic() + timeout_s
        return self._copies.idle(timeout_s) and self.worker.finish(seconds_left(deadline))

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """See `Worker.rewind`.

        Raises:
            RewindError: also when a copy does not end in time.
        """
        deadline = time.monotonic() + timeout_s
        if not self._copies.idle(timeout_s):
            raise RewindError(f"the device has not copied the last snapshot in {timeout_s:g} s: nothing was rewound")
        return self.worker.rewind(step, seconds_left(deadline))

    def close(self, timeout_s: float) -> None:
        """Give what is under way at most `timeout_s` seconds; end the threads, then let go of the memory they used."""
        deadline = time.monotonic() + timeout_s
        copied = self._copies.close(timeout_s)
        ended = self.worker.close(seconds_left(deadline))
        self.pins.release(unused=copied and ended)


def seconds_left(deadline: float) -> float:
    """Until a monotonic time, 0 once it has passed."""
    return max(0.0, deadline - time.monotonic())
