"""Waiting out a server that is not there. Comes in: a call that may raise `Unreachable`; goes out: its result."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ema_reader.errors import Unreachable

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25
PAUSE_S_MAX = 10.0
Result = TypeVar("Result")


def retry_while_unreachable(call: Callable[[], Result], *, sleep: Callable[[float], None] = time.sleep) -> Result:
    """The result of `call`, however long the server stays away; says so once, and once when it is back.

    The pauses double up to `PAUSE_S_MAX` and are jittered, so that many workers do not come back at the same moment.
    """
    failures = 0
    while True:
        try:
            result = call()
        except Unreachable as error:
            if failures == 0:
                log.warning("%s; waiting for it", error)
            pause_s = min(PAUSE_S_MAX, FIRST_PAUSE_S * 2.0**failures)
            failures = min(failures + 1, 10)
            sleep(pause_s * random.uniform(0.5, 1.0))
        else:
            if failures:
                log.info("the server is back")
            return result
