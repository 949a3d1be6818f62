"""Polls a condition with a timeout: how tests wait for other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def eventually(check: Callable[[], Found | None], what: str, timeout_s: float = 30.0, every_s: float = 0.01) -> Found:
    """Poll `check` until its result is true, and return that result.

    Raises:
        AssertionError: it was not true within `timeout_s`; the text names `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(every_s)
    return found
