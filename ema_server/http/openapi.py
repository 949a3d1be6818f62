"""Writes the description of the HTTP API: `python -m ema_server.http.openapi proto/openapi.json`."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

from ema_server.board import Board
from ema_server.catalog import Catalog
from ema_server.datadir import open_data_dir
from ema_server.derived import DerivedStore
from ema_server.deriving import Deriving
from ema_server.http.app import create_app
from ema_server.http.services import Services
from ema_server.jobs import Job
from ema_server.metric_store import MetricStore
from ema_server.ring import Ring
from ema_server.telemetry import Telemetry
from ema_server.validations import Validations


def document() -> str:
    """The OpenAPI document of the server as it is, as text."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir, metrics = open_data_dir(Path(folder)), MetricStore(Path(folder) / "metrics.sqlite")
        try:
            catalog, board, stopping = Catalog(), Board(), threading.Event()
            services = Services(
                catalog=catalog,
                board=board,
                telemetry=Telemetry(),
                metrics=metrics,
                validations=Validations(catalog, board, metrics),
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
