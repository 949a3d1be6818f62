"""A catalog with real files, and the HTTP application over it on a real socket, for tests of HTTP and of the reader."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import uvicorn.server
from safetensors.torch import save_file

from ema_server.averager.jobs import Job
from ema_server.config import ServerConfig
from ema_server.http.app import create_app
from ema_server.http.listener import HttpServer
from ema_server.runs.status_store import AverageStatus, RunState, RunStatus
from ema_server.server import build
from ema_server.storage.catalog import FileEntry, Generation, Version

WAIT_S = 20.0
_PAUSE_S = 0.005


class _Asyncio:
    """asyncio as uvicorn uses it. Its fixed pauses of 0.1 s, two at each stop, would take most of a test."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, _PAUSE_S))


setattr(uvicorn.server, "asyncio", _Asyncio())  # noqa: B010 -- mypy knows it as a module


class Served:
    """The HTTP side of a server, over generations that the test writes. The test provides `submit`."""

    def __init__(self, data: Path, *, token: str | None = None, submit: Callable[[Job], None] | None = None) -> None:
        self.server = build(ServerConfig(data, token=token, kernel="torch"))
        self.services = replace(self.server.services, submit=submit or _refuse_jobs)
        self.data = data
        self.catalog = self.services.catalog
        self.statuses = self.services.statuses
        self.telemetry = self.services.telemetry
        self.metrics = self.services.metrics
        self.validations = self.services.validations
        self.deriving = self.services.deriving
        self.stopping = self.services.stopping
        self._seq = 0

    def start(self) -> None:
        """Start the averager and the publisher, which carry out jobs from now on."""
        self.services = self.server.services
        self.server.start()

    def beat(self) -> None:
        """Record a heartbeat of each thread that readiness checks."""
        self.telemetry.beat("ingest")
        self.telemetry.beat("averager")

    def publish(
        self,
        run: str,
        step: int,
        averages: Sequence[str] = ("ema-0.9",),
        *,
        size: int = 8,
        companions: Mapping[str, bytes] | None = None,
    ) -> Generation:
        """Write a generation to disk and list it; the weights of each average depend on step and name."""
        self._seq += 1
        folder = self.data / "runs" / run / "generations" / f"{self._seq:08d}-{step:012d}"
        versions = tuple(
            _write(folder / "averages" / name, run, name, step, self._seq, size, companions or {}) for name in averages
        )
        generation = Generation(run, self._seq, step, False, False, folder, versions)
        self.catalog.add(generation)
        self.show(run, step, averages)
        return generation

    def show(
        self,
        run: str,
        step: int | None,
        averages: Sequence[str],
        state: RunState = RunState.ACTIVE,
        *,
        is_current: bool = True,
    ) -> None:
        """Put the run's status on the status store."""
        shown = tuple(
            AverageStatus(name, "ema:0.9", step or 0, 0, step, "float32", 0.9, 6.6, 4.5, 0.25) for name in averages
        )
        self.statuses.set(
            RunStatus(
                run=run,
                state=state,
                created="2026-01-01T00:00:00Z",
                step=step,
                published_step=step,
                first_step=1,
                every=1,
                steps_per_second=2.5,
                applied=step or 0,
                gap_steps=0,
                quarantined=0,
                quarantine=None,
                nonfinite_buffers=None,
                exempt=(),
                tensors=2,
                snapshot_bytes=64,
                memory_bytes=128,
                publish_error=None,
                averages=shown,
                is_current=is_current,
            )
        )

    @contextmanager
    def listening(self, port: int = 0, graceful_s: int = 5, host: str = "127.0.0.1") -> Iterator[str]:
        """Serve on a (free) port from a separate thread; yields the URL."""
        server = HttpServer(create_app(self.services), host, port, graceful_s=graceful_s)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(WAIT_S)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(WAIT_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(WAIT_S)
            loop.close()

    def close(self) -> None:
        """Close the database and the folder."""
        if self.server.averager.is_alive():
            self.server.averager.stop(WAIT_S)
        self.server.close()


def weights(name: str, step: int, size: int) -> dict[str, torch.Tensor]:
    """The weights that `publish` writes."""
    torch.manual_seed(step * 1000 + len(name))
    return {"weight": torch.randn(size, 4), "bias": torch.full((3,), float(step))}


def _write(
    folder: Path, run: str, average: str, step: int, seq: int, size: int, companions: Mapping[str, bytes]
) -> Version:
    folder.mkdir(parents=True)
    save_file(weights(average, step, size), folder / "model.safetensors")
    version_id = hashlib.sha256(f"{run}/{average}/{step}/{seq}".encode()).hexdigest()[:40]
    for name, data in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    listed = [{**asdict(_entry(folder / name)), "name": name} for name in ("model.safetensors", *companions)]
    ledger = {"origin": 0, "set": [1], "ranges": [[1, step, 1]]}
    names_of = {"id": version_id, "run": run, "average": average, "step": step}
    about = {**names_of, "ledger": ledger, "paces": [], "files": listed}
    (folder / "version.json").write_text(json.dumps(about))
    names = ("model.safetensors", "version.json", *companions)
    files = tuple(replace(_entry(folder / name), name=name) for name in names)
    created = "2026-01-01T00:00:00Z"
    return Version(version_id, run, average, "ema:0.9", step, step, 0, created, files, folder, seq)


def _entry(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest())


def _refuse_jobs(job: Job) -> None:
    raise AssertionError(f"this test expected no job: {job!r}")
