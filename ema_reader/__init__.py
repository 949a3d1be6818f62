"""Reads averaged weights over HTTP: wait for versions, download them, evaluate them, report and compare metrics.

Start at `Reader`. The package imports nothing of the server and of ZeroMQ.

- `reader`: `Reader`, all that can be read from a server
- `values`, `errors`, `targets`: what its methods return, raise, and accept as text
- `transport`: HTTP
- `download`, `partial`: downloads that are resumed and verified
- `scores`: metrics by version, and the best one
- `averages`, `derived`: averages of a run, and versions made from other versions
- `leases`: which worker evaluates which version
- `evaluation`: the evaluation worker
- `card`: the model card
- `watching`: a folder that is kept at the newest version
- `pushing`: copies of a version in other stores
- `cli`: the commands
"""

from ema_reader.derived import Blended, BlendInput, Synthesized
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
from ema_reader.scores import Best
from ema_reader.values import Average, File, Ledger, MetricsRow, Ranks, Ring, Run, Validation, Version

__all__ = [
    "Reader",
    "Run",
    "Ring",
    "Ranks",
    "Average",
    "Ledger",
    "Version",
    "File",
    "MetricsRow",
    "Best",
    "Synthesized",
    "Blended",
    "BlendInput",
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
