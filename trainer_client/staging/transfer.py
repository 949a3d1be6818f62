"""One snapshot that is being copied: when its slot may be read, and whether someone wrote where nobody should have.

Comes in: what was issued to a device, and who is about to write. Goes out: whole, or torn. Nothing here waits but the
thread that asks for the end, and one that meets a recording which another has begun. Knows no routes and no manifest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor

from trainer_client.model.sources import version_of
from trainer_client.staging.device import Device, DeviceEvent, DeviceStream

_RECORDING_S = 10.0  # issuing the copies takes milliseconds: who waits so long waits for a thread that is stuck


class AsyncCopy:
    """One snapshot on its way from a device into a slot. Any thread may call any method.

    Attributes:
        finished: nothing is under way any more, as far as can be told.
        lost: that could not be told: the device answers no more, and may still write to the slot.
    """

    def __init__(self, device: Device, done: DeviceEvent, tensors: Sequence[Tensor]) -> None:
        self._device = device
        self._done = done
        self._tensors: Sequence[Tensor] = tensors  # held, so that no other object gets one of the ids
        self._ids = frozenset(map(id, tensors))
        self._recorded = threading.Event()
        self._lock = threading.Lock()
        self._watched: list[tuple[Tensor, int]] = []
        self._memory: Sequence[Tensor] = ()
        self._side: DeviceStream | None = None
        self._is_torn: bool | None = None
        self.finished = False
        self.lost = False

    def holds_any(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of `tensors` is in the snapshot, or lies in memory of one that is (a flattened parameter)."""
        if any(id(tensor) in self._ids for tensor in tensors):
            return True
        held = {_memory(tensor) for tensor in self._tensors}
        return any((place := _memory(tensor)) is not None and place in held for tensor in tensors)

    def record(self, side: DeviceStream, watched: Sequence[tuple[Tensor, int]], memory: Sequence[Tensor]) -> None:
        """All copies have been issued to `side`.

        Args:
            side: the stream that has them.
            watched: what they read, with the version that is to be read.
            memory: what they go through. All of it is held until they are done.
        """
        self._watched, self._memory, self._side = list(watched), memory, side
        self._done.record(side)
        self._recorded.set()

    def abandon(self) -> None:
        """The copies could not be issued."""
        self.finished = True
        self._recorded.set()

    def hold_back(self, stream: DeviceStream) -> None:
        """Have what is issued to `stream` from now on wait for the copies; what was written before them counts as torn.

        An event that was not recorded yet is waited for by nobody, so this waits for the recording first.
        """
        if self.finished:
            return
        recorded = self._recorded.wait(_RECORDING_S)
        if recorded:
            self._done.wait(stream)
        self.seal(spoiled=not recorded)

    def wait(self) -> bool:
        """Block until the slot holds everything; False if it is torn. Also if this raises, tensors are let go."""
        if not self.finished:
            try:
                self._device.block_until(self._done)
                self.seal()
            except BaseException:
                self._drain()
                raise
            finally:
                self._watched, self._tensors, self._memory = [], (), ()
                self.finished = True
        return not self._is_torn

    def _drain(self) -> None:
        """The slot goes to another snapshot: no copy may arrive in it any more."""
        try:
            if self._side is not None:
                self._side.synchronize()
        except RuntimeError:
            self.lost = True

    def seal(self, *, spoiled: bool = False) -> None:
        """Judge by the versions now, once: whoever writes later is held back, or has nothing left to tear."""
        with self._lock:
            if self._is_torn is None:
                self._is_torn = spoiled or any(version_of(tensor) != version for tensor, version in self._watched)


def _memory(tensor: Tensor) -> int | None:
    """Where the tensor's memory begins; None for what has none of its own (sparse, sharded), which is never ours."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # NotImplementedError is one
        return None
