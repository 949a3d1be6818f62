"""What the routes work with: made by the composition root, handed to every route as a dependency."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from ema_server.averager.jobs import Job
from ema_server.compute.device import Device
from ema_server.config import ServerConfig
from ema_server.derived.queue import DerivationQueue
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.evaluation.worker import Evaluator
from ema_server.runs.lanes import LaneStore
from ema_server.runs.ranks import RanksStore
from ema_server.runs.status_store import StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.storage.usage import DiskUsage
from ema_server.telemetry import Telemetry

UPLOADS_MAX = 4  # bodies with tensors in memory at once, until their versions are made
FREE_BYTES_MIN = 64 << 20  # room for the metrics, and for the first generation of a small run


@dataclass(frozen=True, slots=True)
class Services:
    """The rest of the server as HTTP sees it.

    Args:
        catalog: versions on disk.
        statuses: state of the runs.
        telemetry: counters, and heartbeats of the other threads.
        metrics: evaluation metrics.
        validations: leases and requested validations.
        deriving: makes derived versions.
        usage: disk space of the runs.
        ranks: the ranks of sharded trainers.
        lanes: how the trainers send their snapshots.
        submit: hands a job to the averager; never blocks.
        has_folder: whether the data folder has one of this run.
        config: the settings.
        stopping: set when the server has begun to stop.
        device: where the averages are kept.
        kernel: what averages are computed with, `torch` or `compiled`.
        evaluator: the server's own evaluation worker, if it has one.
        uploads: held by each body with tensors.
    """

    catalog: Catalog
    statuses: StatusStore
    telemetry: Telemetry
    metrics: MetricStore
    validations: Validations
    deriving: DerivationQueue
    usage: DiskUsage
    ranks: RanksStore
    lanes: LaneStore
    submit: Callable[[Job], None]
    has_folder: Callable[[str], bool]
    config: ServerConfig
    stopping: threading.Event
    device: Device
    kernel: str
    evaluator: Evaluator | None
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS_MAX))

    def is_run(self, name: str) -> bool:
        """Whether a run has this name, had it until it was deleted, or has files on the disk."""
        statuses = self.statuses
        return statuses.get(name) is not None or statuses.deleted_at(name) is not None or self.has_folder(name)

    def needed_bytes(self) -> int:
        """Free space that must stay on the disk: a generation of every run in memory, which stopping writes."""
        return FREE_BYTES_MIN + sum(status.memory_bytes for status in self.statuses.all())


async def get_services(request: Request) -> Services:
    """The services of the application that answers `request`."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
