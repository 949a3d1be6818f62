"""For all tests: nothing of the shell that started them reaches them; those for a GPU are skipped without one."""

from __future__ import annotations

import os
import signal

import pytest
import torch


def pytest_configure() -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, and every process inherits that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EMA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EMA_KERNEL", "torch")  # the compiled one takes each server that is started a second
