"""Writes the description of the HTTP API: `python -m ema_server.http.openapi proto/openapi.json`."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

from ema_server.averager.jobs import Job
from ema_server.derived.queue import Deriving
from ema_server.derived.store import DerivedStore
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.http.app import create_app
from ema_server.http.services import Services
from ema_server.publishing.ring import Ring
from ema_server.runs.status_store import StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.storage.datadir import open_data_dir
from ema_server.telemetry import Telemetry


def document() -> str:
    """The OpenAPI document of the server as it is, as text."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir, metrics = open_data_dir(Path(folder)), MetricStore(Path(folder) / "metrics.sqlite")
        try:
            catalog, statuses, stopping = Catalog(), StatusStore(), threading.Event()
            services = Services(
                catalog=catalog,
                statuses=statuses,
                telemetry=Telemetry(),
                metrics=metrics,
                validations=Validations(catalog, statuses, metrics),
                deriving=Deriving(DerivedStore(data_dir, catalog), Ring(data_dir, size=0), stopping),
                submit=_nobody,
                data=Path(folder),
                token=None,
                stopping=stopping,
            )
            return json.dumps(create_app(services).openapi(), indent=2) + "\n"
        finally:
            metrics.close()
            data_dir.close()


def _nobody(job: Job) -> None:
    raise RuntimeError(f"{job!r}: no averager runs while the API is described")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
