"""For the system tests: the lanes by which a trainer on the server's machine can send its snapshots."""

from __future__ import annotations

import sys

import pytest

LANES = ["zmq", *(["shm"] if sys.platform == "linux" else [])]


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The lane of all trainers of the test, in this process and in others; `auto` would take one of them."""
    monkeypatch.setenv("EMA_LANE", request.param)
    return str(request.param)
