"""What the routes work with: values made by the composition root, handed to every router."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ema_server.averager.jobs import Job
from ema_server.compute.device import HOST, Device
from ema_server.derived.queue import Deriving
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.evaluation.worker import Evaluator
from ema_server.runs.status_store import StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Services:
    """The rest of the server as HTTP sees it.

    Args:
        catalog: versions on disk.
        statuses: state of the runs.
        telemetry: counters and heartbeats of the other threads.
        metrics: evaluation metrics.
        validations: who evaluates what.
        deriving: makes versions of other versions after them.
        submit: hands a job to the averager; never blocks.
        data: the data folder.
        device: what the averages are kept on.
        token: what a client must send; None when none is needed.
        kernel: what averages are computed with, `torch` or `compiled`.
        evaluator: the server's own evaluation worker, if it has one.
        stopping: set when the server has begun to stop.
    """

    catalog: Catalog
    statuses: StatusStore
    telemetry: Telemetry
    metrics: MetricStore
    validations: Validations
    deriving: Deriving
    submit: Callable[[Job], None]
    data: Path
    token: str | None = field(repr=False)
    stopping: threading.Event
    kernel: str = "torch"
    evaluator: Evaluator | None = None
    device: Device = HOST
