"""Copies from a CUDA device that are certainly in progress when the next call is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from trainer_client.staging.device import Cuda

_CYCLES = 100_000_000  # 50 to 80 ms, by the clock of the device; no step of a test takes as long


def delay_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the stream of the copies idle before each snapshot's.

    Otherwise it depends on the speed of the host and the bus whether a copy is still in progress at the next write, and
    a control that expects a torn snapshot proves nothing on the machine where it sees none.
    """
    issue_to = Cuda.issue_to

    @contextmanager
    def late(device: Cuda, stream: Any) -> Iterator[None]:
        with issue_to(device, stream):
            torch.cuda._sleep(_CYCLES)
            yield

    monkeypatch.setattr(Cuda, "issue_to", late)
