"""The description of the API in `proto/openapi.json` is the one that the server gives."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.testclient import TestClient

from ema_server.http import openapi

FILE = Path(__file__).parents[3] / "proto" / "openapi.json"


def test_committed_description_is_current() -> None:
    assert FILE.read_text() == openapi.document(), (
        "the API has changed: python -m ema_server.http.openapi proto/openapi.json"
    )


def test_server_serves_the_committed_description(client: TestClient) -> None:
    assert client.get("/openapi.json").json() == json.loads(FILE.read_text())


def test_every_operation_describes_its_errors_as_problems() -> None:
    document = json.loads(FILE.read_text())

    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) >= 12
    for operation in operations:
        assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
