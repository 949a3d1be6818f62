"""Exceptions of the protocol, and the reject codes of the wire, which SPEC.md section 12 describes.

Invalid input to this package always raises one of these exceptions.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

SHOWN_CHARS = 80  # of a wrong value in an error text


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


class Cure(StrEnum):
    """What the sender does about a REJECT."""

    RECONNECT = "reconnect"
    REJOIN = "reconnect, final at the first JOIN"  # the caller waits for the result of the first JOIN
    RESEND = "resend"
    FINAL = "final"


class RejectCode(StrEnum):
    """Why a peer was refused, what ends with the refusal, and what the sender does about it."""

    scope: Scope
    cure: Cure

    def __new__(cls, value: str, scope: Scope, cure: Cure) -> Self:
        code = str.__new__(cls, value)
        code._value_, code.scope, code.cure = value, scope, cure
        return code

    BAD_FRAME = "bad_frame", Scope.CONNECTION, Cure.REJOIN
    BAD_MESSAGE = "bad_message", Scope.CONNECTION, Cure.REJOIN
    VERSION = "version", Scope.CONNECTION, Cure.FINAL
    UNAUTHORIZED = "unauthorized", Scope.CONNECTION, Cure.FINAL
    STALE_EPOCH = "stale_epoch", Scope.CONNECTION, Cure.RECONNECT
    UNKNOWN_CONNECTION = "unknown_connection", Scope.CONNECTION, Cure.RECONNECT
    BAD_RUN = "bad_run", Scope.RUN, Cure.FINAL
    BAD_AVERAGE = "bad_average", Scope.RUN, Cure.FINAL
    AVERAGE_CHANGED = "average_changed", Scope.RUN, Cure.FINAL
    MANIFEST_INVALID = "manifest_invalid", Scope.RUN, Cure.FINAL
    MANIFEST_CHANGED = "manifest_changed", Scope.RUN, Cure.FINAL
    RUN_IN_USE = "run_in_use", Scope.RUN, Cure.FINAL
    EVICTED = "evicted", Scope.RUN, Cure.FINAL
    NO_GENERATION = "no_generation", Scope.RUN, Cure.FINAL
    NOTHING_TO_CONTINUE = "nothing_to_continue", Scope.RUN, Cure.FINAL
    WORLD_UNSUPPORTED = "world_unsupported", Scope.RUN, Cure.FINAL
    RANKS_DIFFER = "ranks_differ", Scope.RUN, Cure.FINAL
    RANKS_MISSING = "ranks_missing", Scope.RUN, Cure.FINAL
    NOT_TILED = "not_tiled", Scope.RUN, Cure.FINAL
    OUT_OF_MEMORY = "out_of_memory", Scope.RUN, Cure.FINAL
    UNAVAILABLE = "unavailable", Scope.RUN, Cure.REJOIN
    OUT_OF_ORDER = "out_of_order", Scope.SNAPSHOT, Cure.RESEND
    BAD_CHUNK = "bad_chunk", Scope.SNAPSHOT, Cure.RESEND
    CHECKSUM = "checksum", Scope.SNAPSHOT, Cure.RESEND
    INCOMPLETE = "incomplete", Scope.SNAPSHOT, Cure.RESEND
    NOT_FINITE = "not_finite", Scope.SNAPSHOT, Cure.FINAL
    DROPPED = "dropped", Scope.SNAPSHOT, Cure.FINAL
    STEP_PASSED = "step_passed", Scope.SNAPSHOT, Cure.FINAL
