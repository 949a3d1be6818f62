"""Whether the server does its work: threads and device answer, the data folder can be written, there is room.

A server without a trainer is ready. The checks of the disk run in a worker thread: a network disk may hang.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import anyio.to_thread

from ema_server.compute.device import Device
from ema_server.http.schemas import CheckOut
from ema_server.http.services import Services

THREADS = ("ingest", "averager")
BEAT_AGE_S_MAX = 5.0
FREE_BYTES_MIN = 64 << 20  # room for the metrics, and for the first generation of a small run


async def check_all(services: Services) -> dict[str, CheckOut]:
    """Every check by name."""
    needed = needed_bytes(services)
    checks = {name: _thread(services, name) for name in THREADS}
    checks["data"] = await anyio.to_thread.run_sync(_writable, services.data)
    checks["device"] = await anyio.to_thread.run_sync(_answers, services.device)
    checks["publishing"] = _publishing(services)
    checks["disk"] = await anyio.to_thread.run_sync(_room, services.data, needed)
    if services.stopping.is_set():
        checks["stopping"] = CheckOut(ok=False, detail="the server has been asked to stop")
    return checks


def needed_bytes(services: Services) -> int:
    """Room on the disk for a generation of every run in memory, which stopping the server writes."""
    return FREE_BYTES_MIN + sum(status.memory_bytes for status in services.statuses.all())


def _thread(services: Services, name: str) -> CheckOut:
    age_s = services.telemetry.age_s(name)
    if age_s is None:
        return CheckOut(ok=False, detail="not started")
    detail = f"last beat {age_s:.1f} s ago, limit {BEAT_AGE_S_MAX:.0f} s"
    return CheckOut(ok=age_s < BEAT_AGE_S_MAX, detail=detail)


def _publishing(services: Services) -> CheckOut:
    """Averaging goes on while a run cannot be published; what it has since then would be lost with the process."""
    failing = [
        f"run {status.run}: {status.publish_error}" for status in services.statuses.all() if status.publish_error
    ]
    return CheckOut(ok=not failing, detail="; ".join(failing) or "the last generation of every run was written")


def _answers(device: Device) -> CheckOut:
    try:
        return CheckOut(ok=True, detail=f"averages are kept on {device.describe()}")
    except RuntimeError as error:
        return CheckOut(ok=False, detail=f"{device.name}: {error}")


def _writable(data: Path) -> CheckOut:
    try:
        with tempfile.TemporaryFile(dir=data) as probe:
            probe.write(b"\0")
    except OSError as error:
        return CheckOut(ok=False, detail=f"{data}: {error.strerror}")
    return CheckOut(ok=True, detail=f"{data} can be written")


def _room(data: Path, needed: int) -> CheckOut:
    """A generation of every run in memory must fit at once: that is what stopping the server writes."""
    try:
        free = shutil.disk_usage(data).free
    except OSError as error:
        return CheckOut(ok=False, detail=f"{data}: {error.strerror}")
    return CheckOut(ok=free >= needed, detail=f"{free} bytes free, {needed} needed to publish every run once")
