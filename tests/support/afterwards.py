"""A core with what makes derived versions of its runs, and the HTTP application over both, in process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from ema_server.derived.queue import Deriving
from ema_server.derived.store import DerivedStore
from ema_server.evaluation.metric_store import MetricStore
from ema_server.evaluation.scheduler import Validations
from ema_server.http.app import create_app
from ema_server.http.services import Services
from support.server_core import ServerCore, running_core


class Afterwards:
    """What the composition root puts together, without trainers' sockets."""

    def __init__(self, core: ServerCore, data: Path) -> None:
        self.core = core
        self.stopping = threading.Event()
        self.store = DerivedStore(core.data_dir, core.catalog)
        self.deriving = Deriving(self.store, core.ring, self.stopping)
        core.ring.listen(self.store.supersede)
        self.deriving.restore()
        self.metrics = MetricStore(data / "metrics.sqlite")
        self.services = Services(
            catalog=core.catalog,
            statuses=core.statuses,
            telemetry=core.telemetry,
            metrics=self.metrics,
            validations=Validations(core.catalog, core.statuses, self.metrics),
            deriving=self.deriving,
            submit=core.averager.submit,
            data=data,
            token=None,
            stopping=self.stopping,
        )

    @contextmanager
    def client(self) -> Iterator[TestClient]:
        """The application."""
        app = create_app(self.services)
        with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
            yield client


@contextmanager
def afterwards(data: Path, **settings: Any) -> Iterator[Afterwards]:
    """A core and what comes after its runs, for the length of a `with` block."""
    with running_core(data, **settings) as core:
        both = Afterwards(core, data)
        try:
            yield both
        finally:
            both.deriving.stop()
            both.metrics.close()
