"""The messages as values. Comes in: decoded JSON bodies and header fields; goes out: frozen, validated messages.

Which message travels which way, and what it means, is SPEC.md's; here each one says only what it holds. Bodies are JSON
objects; unknown keys are ignored, so a minor version may add some. `codec` turns messages into frames and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from ema_proto import manifest as manifests
from ema_proto.errors import SCOPES, LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.fields import Fields
from ema_proto.limits import (
    AVERAGES_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CONFIG_BYTES_MAX,
    STEP_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from ema_proto.manifest import Manifest
from ema_proto.specs import AverageSpec, parse_average

Mode: TypeAlias = Literal["update", "set"]
Resume: TypeAlias = Literal["auto", "never", "must"]
Continuation: TypeAlias = Literal["new", "continued", "rewound"]

_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on a connection. `proof` answers the CHALLENGE of an earlier HELLO on the same connection."""

    type: ClassVar[int] = 1
    majors: tuple[int, ...] = (VERSION_MAJOR,)
    minor: int = VERSION_MINOR
    capabilities: tuple[str, ...] = ("crc32",)
    proof: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {
            "majors": list(self.majors),
            "minor": self.minor,
            "capabilities": list(self.capabilities),
            "proof": self.proof,
        }

    @classmethod
    def read(cls, fields: Fields) -> Hello:
        """Validate a JSON body."""
        majors = fields.items("majors", 16)
        if not all(type(major) is int for major in majors):
            raise fields.bad("majors")
        return cls(
            majors=tuple(majors),
            minor=fields.integer("minor", 0, _U32),
            capabilities=tuple(str(item)[:64] for item in fields.items("capabilities", 64)),
            proof=fields.optional_text("proof", 128),
        )


@dataclass(frozen=True, slots=True)
class Join:
    """Ask to stream a run: everything the server must know to create, continue or rewind it.

    `first_step` is the steps already taken + 1 in a session's first JOIN (`reconnect` false) and the next step to be
    sent in its later ones. `config` is the text of the versions' `config.json`. `rank` and `world` are reserved for
    sharded trainers.
    """

    type: ClassVar[int] = 2
    run: str
    first_step: int
    manifest: Manifest
    averages: tuple[AverageSpec, ...]
    every: int = 1
    resume: Resume = "auto"
    reconnect: bool = False
    incarnation: int = 0
    checksum: bool = False
    config: str | None = None
    rank: int = 0
    world: int = 1

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {
            "run": self.run,
            "first_step": self.first_step,
            "every": self.every,
            "resume": self.resume,
            "reconnect": self.reconnect,
            "incarnation": self.incarnation,
            "checksum": "crc32" if self.checksum else None,
            "config": self.config,
            "rank": self.rank,
            "world": self.world,
            "averages": [{"name": average.name, "spec": average.spec} for average in self.averages],
            "manifest": self.manifest.to_json(),
        }

    @classmethod
    def read(cls, fields: Fields) -> Join:
        """Validate a JSON body. The run's name is checked by the receiver, which answers it with its own code."""
        checksum = fields.optional_text("checksum", 16)
        if checksum not in (None, "crc32"):
            raise fields.bad("checksum")
        return cls(
            run=fields.text("run", 1024),
            first_step=fields.integer("first_step", 1, STEP_MAX),
            every=fields.integer("every", 1, STEP_MAX),
            resume=fields.choice("resume", ("auto", "never", "must")),
            reconnect=fields.flag("reconnect"),
            incarnation=fields.integer("incarnation", 0, _U63),
            checksum=checksum is not None,
            config=_config(fields),
            rank=fields.integer("rank", 0, _U32),
            world=fields.integer("world", 1, _U32),
            averages=tuple(_average(item) for item in fields.items("averages", AVERAGES_MAX)),
            manifest=manifests.from_json(fields.value("manifest")),
        )


@dataclass(frozen=True, slots=True)
class Begin:
    """A snapshot follows; step and attempt are in the header. `set` replaces the averages instead of updating them."""

    type: ClassVar[int] = 3
    step: int
    attempt: int
    mode: Mode = "update"

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"mode": self.mode}


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` bytes of the snapshot from flat byte `offset`; the payload is the second frame. All of it is header."""

    type: ClassVar[int] = 4
    step: int
    attempt: int
    offset: int
    length: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """All chunks of the snapshot have been sent: how many, and how many bytes."""

    type: ClassVar[int] = 5
    step: int
    attempt: int
    chunks: int
    nbytes: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"chunks": self.chunks, "bytes": self.nbytes}


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by either side. `reply` asks the other side to answer with one that does not."""

    type: ClassVar[int] = 6
    reply: bool = False

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"reply": self.reply}


@dataclass(frozen=True, slots=True)
class Publish:
    """Make what has been committed durable now; a PUBLISHED with the same `request` answers. `pin` keeps it longer."""

    type: ClassVar[int] = 7
    request: int
    pin: bool = False

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "pin": self.pin}


@dataclass(frozen=True, slots=True)
class Rewind:
    """The trainer went back to the state after `step` steps: go back to the newest generation at or before it."""

    type: ClassVar[int] = 8
    request: int
    step: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step}


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is complete: publish it and mark it finished; answered by FINISHED."""

    type: ClassVar[int] = 9
    request: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request}


@dataclass(frozen=True, slots=True)
class Bye:
    """The session ends; the run stays open."""

    type: ClassVar[int] = 10

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {}


@dataclass(frozen=True, slots=True)
class Challenge:
    """Answer to a HELLO without proof where a token is needed: prove it over this nonce (hex)."""

    type: ClassVar[int] = 64
    nonce: str

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"nonce": self.nonce}


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


@dataclass(frozen=True, slots=True)
class Credit:
    """How many chunks the sender may have sent on this connection in all. Never falls."""

    type: ClassVar[int] = 67
    limit: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"limit": self.limit}


@dataclass(frozen=True, slots=True)
class Committed:
    """The snapshot is applied in memory (or was before: commits are idempotent)."""

    type: ClassVar[int] = 68
    step: int
    attempt: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {}


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
        return {"step": self.step, "request": self.request, "error": self.error}


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run is back at `step`; with `error`, nothing was changed and it says why."""

    type: ClassVar[int] = 70
    request: int
    step: int | None
    error: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step, "error": self.error}


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is finished and durable at `step` (None when it never had a snapshot); with `error`, it is not."""

    type: ClassVar[int] = 71
    request: int
    step: int | None
    error: str | None = None

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step, "error": self.error}


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
        return {"scope": self.scope.value, "code": self.code.value, "text": self.text}


Message: TypeAlias = (
    Hello
    | Join
    | Begin
    | Chunk
    | Commit
    | Heartbeat
    | Publish
    | Rewind
    | Finish
    | Bye
    | Challenge
    | Welcome
    | Joined
    | Credit
    | Committed
    | Published
    | Rewound
    | Finished
    | Reject
)


def _average(item: object) -> AverageSpec:
    if not isinstance(item, Mapping) or not isinstance(item.get("spec"), str) or not isinstance(item.get("name"), str):
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, f"{json.dumps(item)[:80]} is not an average: name and spec")
    try:
        return parse_average(item["spec"], name=item["name"])
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None


def _config(fields: Fields) -> str | None:
    text = fields.optional_text("config", CONFIG_BYTES_MAX)
    try:
        if text is not None and not isinstance(json.loads(text.encode()), dict):
            raise fields.bad("config")
    except (ValueError, RecursionError):
        raise fields.bad("config") from None
    return text


def read_chunk_bytes(fields: Fields) -> int:
    """The chunk size of a WELCOME, within the limits that both sides keep."""
    return fields.integer("chunk_bytes", CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
