"""Reads averaged weights over HTTP: wait for versions, download them, evaluate them, report metrics.

Start at `Reader`. Nothing here knows the server's code, ZeroMQ, or how an average is made.
"""

from ema_reader.derived import Synthesized
from ema_reader.errors import (
    LeaseLost,
    NotFound,
    ReaderError,
    RequestRefused,
    Unauthorized,
    Unreachable,
    VerificationFailed,
    WaitTimeout,
)
from ema_reader.reader import Reader
from ema_reader.values import Average, File, Ledger, MetricsRow, Ring, Run, Validation, Version

__all__ = [
    "Reader",
    "Run",
    "Ring",
    "Average",
    "Ledger",
    "Version",
    "File",
    "MetricsRow",
    "Synthesized",
    "Validation",
    "ReaderError",
    "NotFound",
    "RequestRefused",
    "LeaseLost",
    "Unauthorized",
    "Unreachable",
    "VerificationFailed",
    "WaitTimeout",
]
