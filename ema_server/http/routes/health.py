"""Health: whether the event loop answers, and whether the server does its work.

A server without a trainer is ready. Checks of the disk run in a worker thread: a network disk may hang.
"""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter, Request

from ema_server.compute.device import Device
from ema_server.http.middleware import IS_ADMITTED
from ema_server.http.problems import Code, Problem
from ema_server.http.schemas import CheckOut, HealthOut, ProblemOut, ReadyOut
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.disk import megabytes, probe_write, shortage

THREADS = ("ingest", "averager")
BEAT_AGE_S_MAX = 5.0
_HIDDEN = "details are for requests with the token"

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="get_health")
async def health() -> HealthOut:
    """The event loop answers. Does no I/O and needs no token."""
    return HealthOut()


@router.get("/readyz", operation_id="get_ready", responses={503: {"model": ProblemOut}})
async def ready(request: Request, services: ServicesDep) -> ReadyOut:
    """Whether the server is ready, check by check; 503 if a check fails.

    Needs no token. If the server has one, only requests that carry it are answered with details.
    """
    checks = await _check_all(services)
    if not getattr(request.state, IS_ADMITTED, True):
        checks = {name: CheckOut(ok=check.ok, detail=_HIDDEN) for name, check in checks.items()}
    failed = [f"{name}: {check.detail}" for name, check in checks.items() if not check.ok]
    if failed:
        extra = {"ready": False, "checks": {name: check.model_dump() for name, check in checks.items()}}
        raise Problem(Code.NOT_READY, "; ".join(failed), extra=extra)
    return ReadyOut(ready=True, checks=checks)


async def _check_all(services: Services) -> dict[str, CheckOut]:
    needed = services.needed_bytes()
    checks = {name: _thread(services, name) for name in THREADS}
    checks["data"] = await anyio.to_thread.run_sync(_writable, services.config.data)
    checks["device"] = await anyio.to_thread.run_sync(_answers, services.device)
    checks["publishing"] = _publishing(services)
    checks["disk"] = await anyio.to_thread.run_sync(_room, services.config.data, needed)
    if services.stopping.is_set():
        checks["stopping"] = CheckOut(ok=False, detail="the server is stopping")
    return checks


def _thread(services: Services, name: str) -> CheckOut:
    age_s = services.telemetry.age_s(name)
    if age_s is None:
        return CheckOut(ok=False, detail="not started")
    detail = f"its thread reported {age_s:.1f} s ago; it counts as stopped after {BEAT_AGE_S_MAX:.0f} s"
    return CheckOut(ok=age_s < BEAT_AGE_S_MAX, detail=detail)


def _publishing(services: Services) -> CheckOut:
    """Averaging continues while a run cannot be published, but the steps since then would be lost with the process."""
    failing = [
        f"run {status.run}: {status.publish_error}" for status in services.statuses.all() if status.publish_error
    ]
    return CheckOut(ok=not failing, detail="; ".join(failing) or "the last generation of every run was written")


def _answers(device: Device) -> CheckOut:
    try:
        return CheckOut(ok=True, detail=f"averages are kept on {device.describe()}")
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        return CheckOut(ok=False, detail=f"{device.name}: {first_line}: no run can be averaged; restart the server")


def _writable(data: Path) -> CheckOut:
    try:
        probe_write(data)
    except OSError as error:
        return CheckOut(ok=False, detail=f"{data}: {error.strerror}")
    return CheckOut(ok=True, detail=f"{data} can be written")


def _room(data: Path, needed: int) -> CheckOut:
    try:
        short = shortage(data, needed)
    except OSError as error:
        return CheckOut(ok=False, detail=f"{data}: {error.strerror}")
    return CheckOut(ok=short is None, detail=short or f"there is room to publish every run once ({megabytes(needed)})")
