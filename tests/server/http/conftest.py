"""The application over a temporary data folder, in process and on a socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ema_server.http.app import create_app
from support.served import Served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "data")
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(create_app(served.services), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def url(served: Served) -> Iterator[str]:
    with served.listening() as url:
        yield url
