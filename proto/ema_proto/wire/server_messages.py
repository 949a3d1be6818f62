"""Messages from server to trainer. Each is a frozen value with its JSON body; see `trainer_messages` for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from ema_proto.errors import SCOPES, RejectCode, Scope
from ema_proto.limits import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    NONCE_CHARS_MAX,
    RECENT_STEPS,
    STEP_MAX,
    TEXT_CHARS_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from ema_proto.wire.fields import Fields

Continuation: TypeAlias = Literal["new", "continued", "rewound"]

_LANE_CHARS_MAX = 16
_U8 = (1 << 8) - 1
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Challenge:
    """Answer to a HELLO without proof where a token is needed: prove it over this nonce (hex)."""

    type: ClassVar[int] = 64
    nonce: str

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"nonce": self.nonce}

    @classmethod
    def read(cls, fields: Fields) -> Challenge:
        """Validate what a peer sent."""
        return cls(fields.text("nonce", NONCE_CHARS_MAX))


@dataclass(frozen=True, slots=True)
class Welcome:
    """The connection is accepted; the header's epoch identifies this start of the server."""

    type: ClassVar[int] = 65
    epoch: int
    chunk_bytes: int
    major: int = VERSION_MAJOR
    minor: int = VERSION_MINOR
    capabilities: tuple[str, ...] = ("crc32",)

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {
            "major": self.major,
            "minor": self.minor,
            "chunk_bytes": self.chunk_bytes,
            "capabilities": list(self.capabilities),
        }

    @classmethod
    def read(cls, fields: Fields) -> Welcome:
        """Validate what a peer sent."""
        return cls(
            epoch=fields.epoch,
            chunk_bytes=fields.integer("chunk_bytes", CHUNK_BYTES_MIN, CHUNK_BYTES_MAX),
            major=fields.integer("major", 0, _U8),
            minor=fields.integer("minor", 0, _U8),
            capabilities=fields.capabilities(),
        )


@dataclass(frozen=True, slots=True)
class Joined:
    """The session owns the run. Steps are those last applied and last durable, None when there is none.

    `recent` names the newest applied steps: a sender whose COMMITTED was lost finds its snapshot there, or knows that
    it was not applied.
    """

    type: ClassVar[int] = 66
    last_step: int | None
    published_step: int | None
    recent: tuple[int, ...]
    continuation: Continuation
    credit: int
    lane: str = "zmq"

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {
            "last_step": self.last_step,
            "published_step": self.published_step,
            "recent": list(self.recent),
            "continuation": self.continuation,
            "credit": self.credit,
            "lane": self.lane,
        }

    @classmethod
    def read(cls, fields: Fields) -> Joined:
        """Validate what a peer sent."""
        return cls(
            last_step=fields.optional_step("last_step"),
            published_step=fields.optional_step("published_step"),
            recent=fields.integers("recent", RECENT_STEPS, STEP_MAX),
            continuation=fields.choice("continuation", ("new", "continued", "rewound")),
            credit=fields.integer("credit", 0, _U64),
            lane=fields.text("lane", _LANE_CHARS_MAX),
        )


@dataclass(frozen=True, slots=True)
class Credit:
    """How many chunks the sender may have sent on this connection in all. Never falls."""

    type: ClassVar[int] = 67
    limit: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"limit": self.limit}

    @classmethod
    def read(cls, fields: Fields) -> Credit:
        """Validate what a peer sent."""
        return cls(fields.integer("limit", 0, _U64))


@dataclass(frozen=True, slots=True)
class Committed:
    """The snapshot is applied in memory (or was before: commits are idempotent)."""

    type: ClassVar[int] = 68
    step: int
    attempt: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {}

    @classmethod
    def read(cls, fields: Fields) -> Committed:
        """Validate what a peer sent."""
        return cls(fields.step, fields.attempt)


@dataclass(frozen=True, slots=True)
class Published:
    """A generation at `step` is durable. `request` echoes the PUBLISH that asked, None for a scheduled one.

    `error` says why a requested one could not be written; `step` is then the last durable one, None without any.
    """

    type: ClassVar[int] = 69
    step: int | None
    request: int | None = None
    error: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"step": self.step, "request": self.request, "error": _sayable(self.error)}

    @classmethod
    def read(cls, fields: Fields) -> Published:
        """Validate what a peer sent."""
        return cls(
            fields.optional_step("step"), fields.optional_integer("request", 0, STEP_MAX), fields.optional_error()
        )


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run is back at `step`; with `error`, nothing was changed and it says why."""

    type: ClassVar[int] = 70
    request: int
    step: int | None
    error: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step, "error": _sayable(self.error)}

    @classmethod
    def read(cls, fields: Fields) -> Rewound:
        """Validate what a peer sent."""
        return cls(fields.request(), fields.optional_step("step"), fields.optional_error())


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is finished and durable at `step` (None when it never had a snapshot); with `error`, it is not."""

    type: ClassVar[int] = 71
    request: int
    step: int | None
    error: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step, "error": _sayable(self.error)}

    @classmethod
    def read(cls, fields: Fields) -> Finished:
        """Validate what a peer sent."""
        return cls(fields.request(), fields.optional_step("step"), fields.optional_error())


@dataclass(frozen=True, slots=True)
class Reject:
    """Refused: what (`scope`, fixed by the code), why, and in words what to do. Snapshots name step and attempt."""

    type: ClassVar[int] = 72
    code: RejectCode
    text: str
    step: int = 0
    attempt: int = 0
    scope: Scope = field(init=False)

    def __post_init__(self) -> None:
        """Derive the scope."""
        object.__setattr__(self, "scope", SCOPES[self.code])

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"scope": self.scope.value, "code": self.code.value, "text": _sayable(self.text)}

    @classmethod
    def read(cls, fields: Fields) -> Reject:
        """Validate what a peer sent."""
        return cls(
            fields.choice("code", tuple(RejectCode)), fields.text("text", TEXT_CHARS_MAX), fields.step, fields.attempt
        )


def _sayable(text: str | None) -> str | None:
    """A text that the other side can read: of bounded length, and without the surrogates of undecodable paths."""
    return text if text is None else text[:TEXT_CHARS_MAX].encode(errors="replace").decode()
