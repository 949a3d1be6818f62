"""Every way the protocol says no.

Inside the package an invalid input always raises one of these; nothing else escapes. `RejectCode` is the wire's
vocabulary: SPEC.md lists the same codes, and `tests/proto/test_spec.py` holds the two together.
"""

from __future__ import annotations

from enum import StrEnum


class ProtocolError(Exception):
    """Base of the two kinds of fault; never raised itself."""


class LocalProtocolError(ProtocolError, ValueError):
    """This side was asked for something that the protocol does not allow (a name, a spec, an order of calls)."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that break the protocol; `code` is what to answer."""

    def __init__(self, code: RejectCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Scope(StrEnum):
    """What a REJECT ends: the connection, the run's session on it, or one snapshot."""

    CONNECTION = "connection"
    RUN = "run"
    SNAPSHOT = "snapshot"


class RejectCode(StrEnum):
    """Why a peer was refused. The scope of each code is fixed (`SCOPES`)."""

    BAD_FRAME = "bad_frame"
    BAD_MESSAGE = "bad_message"
    VERSION = "version"
    UNAUTHORIZED = "unauthorized"
    STALE_EPOCH = "stale_epoch"
    UNKNOWN_CONNECTION = "unknown_connection"

    BAD_RUN = "bad_run"
    BAD_AVERAGE = "bad_average"
    AVERAGE_CHANGED = "average_changed"
    MANIFEST_INVALID = "manifest_invalid"
    MANIFEST_CHANGED = "manifest_changed"
    RUN_IN_USE = "run_in_use"
    EVICTED = "evicted"
    NO_GENERATION = "no_generation"
    NOTHING_TO_CONTINUE = "nothing_to_continue"
    WORLD_UNSUPPORTED = "world_unsupported"
    OUT_OF_MEMORY = "out_of_memory"
    UNAVAILABLE = "unavailable"

    OUT_OF_ORDER = "out_of_order"
    BAD_CHUNK = "bad_chunk"
    CHECKSUM = "checksum"
    INCOMPLETE = "incomplete"
    NOT_FINITE = "not_finite"
    STEP_PASSED = "step_passed"


_CONNECTION = (
    RejectCode.BAD_FRAME,
    RejectCode.BAD_MESSAGE,
    RejectCode.VERSION,
    RejectCode.UNAUTHORIZED,
    RejectCode.STALE_EPOCH,
    RejectCode.UNKNOWN_CONNECTION,
)
_SNAPSHOT = (
    RejectCode.OUT_OF_ORDER,
    RejectCode.BAD_CHUNK,
    RejectCode.CHECKSUM,
    RejectCode.INCOMPLETE,
    RejectCode.NOT_FINITE,
    RejectCode.STEP_PASSED,
)

SCOPES: dict[RejectCode, Scope] = {
    code: Scope.CONNECTION if code in _CONNECTION else Scope.SNAPSHOT if code in _SNAPSHOT else Scope.RUN
    for code in RejectCode
}

# What the sender does about it. A code in neither set is final for its scope.
RECONNECT: frozenset[RejectCode] = frozenset(
    {
        RejectCode.STALE_EPOCH,
        RejectCode.UNKNOWN_CONNECTION,
        RejectCode.BAD_FRAME,
        RejectCode.BAD_MESSAGE,
        RejectCode.UNAVAILABLE,
    }
)
RESEND: frozenset[RejectCode] = frozenset(
    {RejectCode.OUT_OF_ORDER, RejectCode.BAD_CHUNK, RejectCode.CHECKSUM, RejectCode.INCOMPLETE}
)
