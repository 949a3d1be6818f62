"""For all tests: no setting of the shell reaches them, and tests for a GPU are skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch


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
