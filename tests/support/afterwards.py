"""A core with the HTTP application over it, in process: derived versions of real runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from ema_server.http.app import create_app
from support.server_core import ServerCore, running_core


class Afterwards:
    """A running core, and the parts of its server that make derived versions."""

    def __init__(self, core: ServerCore) -> None:
        self.core = core
        self.services = core.server.services
        self.deriving = self.services.deriving
        self.store = self.deriving.store
        self.stopping = self.services.stopping

    @contextmanager
    def client(self) -> Iterator[TestClient]:
        """The application."""
        app = create_app(self.services)
        with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
            yield client


@contextmanager
def afterwards(data: Path, **settings: Any) -> Iterator[Afterwards]:
    """A core and its derived versions, within a `with` block."""
    with running_core(data, **settings) as core:
        yield Afterwards(core)
