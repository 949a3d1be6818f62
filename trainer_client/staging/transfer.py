"""One copy of a snapshot in progress: when its slot may be read, and whether the snapshot is torn.

A snapshot is torn when something wrote to its tensors while they were copied.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

from torch import Tensor

from trainer_client.model.sources import storage_address, version_of
from trainer_client.staging.device import Device, DeviceEvent, DeviceStream

_RECORDING_S = 10.0  # issuing the copies takes milliseconds: after this long the issuing thread is stuck


class AsyncCopy:
    """The copy of one snapshot from a device into a slot, marked by `done`. Any thread may call any method.

    Attributes:
        finished: the copy has ended, or was given up.
        lost: the device no longer answers, and may still write to the slot.
    """

    def __init__(self, device: Device, done: DeviceEvent, tensors: Sequence[Tensor]) -> None:
        self._device = device
        self._done = done
        self._tensors: Sequence[Tensor] = tensors  # keeps them alive, so that no other object gets one of the ids
        self._ids = frozenset(map(id, tensors))
        self._recorded = threading.Event()
        self._lock = threading.Lock()
        self._watched: list[tuple[Tensor, int]] = []
        self._memory: Sequence[Tensor] = ()
        self._scattered: Sequence[tuple[Tensor, Tensor]] = ()
        self._side: DeviceStream | None = None
        self._is_torn: bool | None = None
        self.finished = False
        self.lost = False

    def holds_any(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of `tensors` is in the snapshot, or shares memory with it (a flattened parameter)."""
        if any(id(tensor) in self._ids for tensor in tensors):
            return True
        held = {storage_address(tensor) for tensor in self._tensors}
        return any((place := storage_address(tensor)) is not None and place in held for tensor in tensors)

    def record(
        self,
        side: DeviceStream,
        watched: Sequence[tuple[Tensor, int]],
        memory: Sequence[Tensor],
        scattered: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Note that all copies have been issued.

        Args:
            side: the stream that they were issued to.
            watched: the tensors that they read, with the version to be read.
            memory: the scratch memory that they use. All of it is kept alive until they are done.
            scattered: places in the slot, each with the host memory that is copied there when they are done.
        """
        self._watched, self._memory, self._side, self._scattered = list(watched), memory, side, scattered
        self._done.record(side)
        self._recorded.set()

    def abandon(self) -> None:
        """Note that the copies could not be issued."""
        self.finished = True
        self._recorded.set()

    def hold_back(self, stream: DeviceStream) -> None:
        """Have later work on `stream` wait for the copies; the snapshot is torn if tensors were written already.

        A stream does not wait for an event that is not recorded yet, so this waits for the recording first.
        """
        if self.finished:
            return
        recorded = self._recorded.wait(_RECORDING_S)
        if recorded:
            self._done.wait(stream)
        self.seal(spoiled=not recorded)

    def wait(self) -> bool:
        """Block until the slot is filled; False if the snapshot is torn. Releases the tensors, also if it raises."""
        if not self.finished:
            try:
                self._device.block_until(self._done)
                self.seal()
                for there, here in self._scattered:
                    ctypes.memmove(there.data_ptr(), here.data_ptr(), there.nbytes)
            except BaseException:
                self._drain()
                raise
            finally:
                self._watched, self._tensors, self._memory, self._scattered = [], (), (), ()
                self.finished = True
        return not self._is_torn

    def _drain(self) -> None:
        """Make sure that no copy arrives in the slot later, since another snapshot will use it."""
        try:
            if self._side is not None:
                self._side.synchronize()
        except RuntimeError:
            self.lost = True

    def seal(self, *, spoiled: bool = False) -> None:
        """Decide, once, whether the snapshot is torn: later writes wait for the copies, or come after them."""
        with self._lock:
            if self._is_torn is None:
                self._is_torn = spoiled or any(version_of(tensor) != version for tensor, version in self._watched)
