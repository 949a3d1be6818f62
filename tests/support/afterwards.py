"""A keeper with what makes derived versions of its runs, and the HTTP application over both, in process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from ema_server.derived import DerivedStore
from ema_server.deriving import Deriving
from ema_server.http.app import create_app
from ema_server.http.services import Services
from ema_server.metric_store import MetricStore
from ema_server.validations import Validations
from support.keeper import Keeper, keeping


class Afterwards:
    """What the composition root puts together, without trainers' sockets."""

    def __init__(self, keeper: Keeper, data: Path) -> None:
        self.keeper = keeper
        self.stopping = threading.Event()
        self.store = DerivedStore(keeper.data_dir, keeper.catalog)
        self.deriving = Deriving(self.store, keeper.ring, self.stopping)
        keeper.ring.listen(self.store.supersede)
        self.deriving.restore()
        self.metrics = MetricStore(data / "metrics.sqlite")
        self.services = Services(
            catalog=keeper.catalog,
            board=keeper.board,
            telemetry=keeper.telemetry,
            metrics=self.metrics,
            validations=Validations(keeper.catalog, keeper.board, self.metrics),
            deriving=self.deriving,
            submit=keeper.averager.submit,
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
    """A keeper and what comes after its runs, for the length of a `with` block."""
    with keeping(data, **settings) as keeper:
        both = Afterwards(keeper, data)
        try:
            yield both
        finally:
            both.deriving.stop()
            both.metrics.close()
