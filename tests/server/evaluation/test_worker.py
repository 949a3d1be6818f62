"""The supervisor of the server's own worker: it restarts it, later each time, and reports its state."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ema_reader import Reader
from ema_server.config import ServerConfig
from ema_server.evaluation.worker import WORKER, Evaluator
from support.waiting import eventually

pytestmark = pytest.mark.process

NOWHERE = "http://127.0.0.1:1"
WAIT_S = 60.0


async def until(check: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, check, "the state of the evaluator", WAIT_S)


def test_failing_worker_is_restarted_after_twice_the_pause_each_time() -> None:
    ended: list[str] = []
    evaluator = Evaluator(ServerConfig(Path("data"), evaluate="no_such_module_here:f"), ended.append)

    async def watch() -> list[str]:
        evaluator.start(NOWHERE)
        states = [evaluator.state()]
        for count in (1, 2, 3):
            await until(lambda count=count: len(ended) == count and "restarted" in evaluator.state())  # type: ignore[misc]
            states.append(evaluator.state())
        await evaluator.stop()
        return states

    first, *later = asyncio.run(watch())
    assert "is starting" in first
    assert [re.findall(r"after ([\d.]+) s", state) for state in later] == [["0.5"], ["1"], ["2"]]
    assert all("exit code 2" in state for state in later)
    assert ended == [WORKER] * 3


def test_stop_ends_the_worker_and_starts_no_other() -> None:
    ended: list[str] = []
    evaluator = Evaluator(ServerConfig(Path("data"), evaluate="json:dumps"), ended.append)

    async def stop() -> None:
        evaluator.start(NOWHERE)
        await until(lambda: "has started" in evaluator.state())
        await evaluator.stop()

    asyncio.run(stop())
    assert ended == []


def test_evaluator_that_was_never_started_can_be_stopped() -> None:
    asyncio.run(Evaluator(ServerConfig(Path("data"), evaluate="json:dumps"), print).stop())


def test_worker_reaches_its_server_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Reader` needs no usable proxy for a host in NO_PROXY."""
    monkeypatch.setenv("ALL_PROXY", "nonsense://x:1")
    monkeypatch.setenv("no_proxy", "example.org")
    evaluator = Evaluator(ServerConfig(Path("data"), evaluate="json:dumps"), print)

    environment = evaluator._environment("http://198.51.100.7:8080")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert environment["NO_PROXY"] == environment["no_proxy"] == "example.org,198.51.100.7"
    Reader().close()
