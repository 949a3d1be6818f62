"""Exceptions of the protocol, and the reject codes of the wire, which SPEC.md section 12 describes.

Invalid input to this package always raises one of these exceptions.
"""

from __future__ import annotations

from enum import StrEnum


class ProtocolError(Exception):
    """Base of the two kinds of fault; never raised itself."""


class LocalProtocolError(ProtocolError, ValueError):
    """The caller asked for something that the protocol does not allow (a name, a spec, an order of calls)."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that violate the protocol; `code` is the answer."""

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


class Cure(StrEnum):
    """What the sender does about a REJECT."""

    RECONNECT = "reconnect"
    REJOIN = "reconnect, final at the first JOIN"  # the caller waits for the result of the first JOIN
    RESEND = "resend"
    FINAL = "final"


_RULES: dict[RejectCode, tuple[Scope, Cure]] = {
    RejectCode.BAD_FRAME: (Scope.CONNECTION, Cure.REJOIN),
    RejectCode.BAD_MESSAGE: (Scope.CONNECTION, Cure.REJOIN),
    RejectCode.VERSION: (Scope.CONNECTION, Cure.FINAL),
    RejectCode.UNAUTHORIZED: (Scope.CONNECTION, Cure.FINAL),
    RejectCode.STALE_EPOCH: (Scope.CONNECTION, Cure.RECONNECT),
    RejectCode.UNKNOWN_CONNECTION: (Scope.CONNECTION, Cure.RECONNECT),
    RejectCode.BAD_RUN: (Scope.RUN, Cure.FINAL),
    RejectCode.BAD_AVERAGE: (Scope.RUN, Cure.FINAL),
    RejectCode.AVERAGE_CHANGED: (Scope.RUN, Cure.FINAL),
    RejectCode.MANIFEST_INVALID: (Scope.RUN, Cure.FINAL),
    RejectCode.MANIFEST_CHANGED: (Scope.RUN, Cure.FINAL),
    RejectCode.RUN_IN_USE: (Scope.RUN, Cure.FINAL),
    RejectCode.EVICTED: (Scope.RUN, Cure.FINAL),
    RejectCode.NO_GENERATION: (Scope.RUN, Cure.FINAL),
    RejectCode.NOTHING_TO_CONTINUE: (Scope.RUN, Cure.FINAL),
    RejectCode.WORLD_UNSUPPORTED: (Scope.RUN, Cure.FINAL),
    RejectCode.OUT_OF_MEMORY: (Scope.RUN, Cure.FINAL),
    RejectCode.UNAVAILABLE: (Scope.RUN, Cure.REJOIN),
    RejectCode.OUT_OF_ORDER: (Scope.SNAPSHOT, Cure.RESEND),
    RejectCode.BAD_CHUNK: (Scope.SNAPSHOT, Cure.RESEND),
    RejectCode.CHECKSUM: (Scope.SNAPSHOT, Cure.RESEND),
    RejectCode.INCOMPLETE: (Scope.SNAPSHOT, Cure.RESEND),
    RejectCode.NOT_FINITE: (Scope.SNAPSHOT, Cure.FINAL),
    RejectCode.STEP_PASSED: (Scope.SNAPSHOT, Cure.FINAL),
}
SCOPES: dict[RejectCode, Scope] = {code: scope for code, (scope, _) in _RULES.items()}
CURES: dict[RejectCode, Cure] = {code: cure for code, (_, cure) in _RULES.items()}
