"""One pass with the averages on a GPU, as `ema serve --device cuda` has them, against the bus transfers alone.

Measures the pass, and writing a generation's bytes, beside copies of the same bytes
between pinned memory and the device. Sockets and disks are not included. Without a CUDA device there are no rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.result import Row, Section, Spread, interleaved
from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.compute.cuda import open_device
from ema_server.compute.device import HOST, Device
from ema_server.compute.kernel import Target
from ema_server.compute.memory import Memory
from ema_server.compute.pool import WorkerPool
from ema_server.ingest.staging import Slot
from ema_server.tensors.layout import Form, held_nbytes, segments

_ELEMENTS = 86_567_656  # a ViT-B/16
_ELEMENTS_QUICK = 3_000_000
_AVERAGES = 3
_WEIGHT = 0.001
_TITLE = "device: one pass over three averages on a GPU"


class _Shown:
    """Discards the blocks of a generation."""

    def __init__(self, memories: list[Memory]) -> None:
        self._memories = memories

    def write(self, index: int, begin: int, end: int) -> None:
        """See `BlockSink.write`."""
        self._memories[index].show(begin, end, lambda data, at: None)


def measure(*, quick: bool) -> Section:
    """On the first CUDA device, float32."""
    if not torch.cuda.is_available():
        return Section(_TITLE, "rival", (), "No CUDA device here: `python -m benchmarks device` measures where one is.")
    device = open_device("cuda")
    elements = _ELEMENTS_QUICK if quick else _ELEMENTS
    what = f"{elements / 1e6:.3g} M, {torch.cuda.get_device_name(device.torch_device)}"
    return Section(_TITLE, "rival", compared(device, what, elements, rounds=2 if quick else 9))


def compared(device: Device, what: str, elements: int, rounds: int) -> tuple[Row, ...]:
    """The rows for one device."""
    on_gpu = device.torch_device.type == "cuda"
    manifest = Manifest((TensorSpec("weight", "F32", (elements,), Role.PARAM, 0),))
    slot = Slot(manifest.nbytes)
    slot.tensor.view(torch.float32).normal_()
    there, here = _Arm(device, manifest, slot), _Arm(HOST, manifest, slot)
    pinned = torch.empty(manifest.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
    bare = torch.empty(manifest.nbytes, dtype=torch.uint8, device=device.torch_device)
    found = interleaved(
        rounds,
        update=_timed(there.update, on_gpu),
        up=_timed(lambda: bare.copy_(pinned), on_gpu),
        host=_timed(here.update, on_gpu),
        write=_timed(there.write, on_gpu),
        down=_timed(lambda: [pinned.copy_(bare) for _ in range(_AVERAGES)], on_gpu),
    )
    there.close()
    here.close()
    return (
        _row(f"{what}: update", found["update"], found["up"], "one pinned copy up", "≤ 2"),
        _row(f"{what}: update", found["update"], found["host"], f"the CPU, {HOST.workers} threads", "none"),
        _row(f"{what}: all bytes of a generation", found["write"], found["down"], "pinned copies down", "≤ 2"),
    )


class _Arm:
    """A pool and its averages on one device."""

    def __init__(self, device: Device, manifest: Manifest, slot: Slot) -> None:
        self._crew = WorkerPool(device.workers, device.block_elements, device)
        self._segments, self._slot = segments(manifest, lambda _: -1), slot
        memories = [device.allocate(held_nbytes(manifest, Form.WIDE)) for _ in range(_AVERAGES)]
        self._targets = [Target(memory.data, Form.WIDE, _WEIGHT) for memory in memories]
        self._shown = _Shown(memories)

    def update(self) -> None:
        self._crew.update(self._segments, self._slot.tensor, self._targets, None)

    def write(self) -> None:
        self._crew.write(self._segments, [Form.WIDE] * _AVERAGES, self._shown)

    def close(self) -> None:
        self._crew.close()


def _row(what: str, ours: list[float], rival: list[float], against: str, aim: str) -> Row:
    shown = f"{Spread.of(rival).show('ms', 1e3)}, {against}"
    return Row(what, Spread.of(ours).show("ms", 1e3), shown, Spread.ratio(ours, rival), aim)


def _timed(work: Callable[[], object], on_gpu: bool) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run
