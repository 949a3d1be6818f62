"""All messages, used as `m.Join`, `m.Joined` and so on. Each is a frozen value; its body has its fields in their order.

SPEC.md says when each message is allowed and what it means. `codec` turns messages into frames and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from ema_proto.averages.rules import AverageSpec
from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import (
    AVERAGES_MAX,
    CAPABILITIES_MAX,
    CAPABILITY_CHARS_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CONFIG_BYTES_MAX,
    FILES_MAX,
    GANG_CHARS_MAX,
    MAJORS_MAX,
    NAME_CHARS_MAX,
    NONCE_CHARS_MAX,
    PROOF_CHARS_MAX,
    RECENT_STEPS,
    STEP_MAX,
    TENSORS_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from ema_proto.wire import files as companions
from ema_proto.wire import manifest as manifests
from ema_proto.wire.body import (
    FLAG,
    HEADER,
    MESSAGE_TEXT,
    QUANTITY,
    Kind,
    WithBody,
    choice,
    integer,
    list_of,
    optional,
    shown,
    text,
)
from ema_proto.wire.files import FileSpec
from ema_proto.wire.manifest import Manifest

CRC32 = "crc32"  # capability: chunks may carry a checksum
FILES = "files"  # capability: a run may have companion files
ZMQ = "zmq"  # the lane of snapshots that are sent in chunks
SHM = "shm"  # capability, and the lane: snapshots lie in memory that both ends have mapped

Mode: TypeAlias = Literal["update", "set"]
Resume: TypeAlias = Literal["auto", "never", "must"]
Continuation: TypeAlias = Literal["new", "continued", "rewound"]

_RUN_CHARS_MAX = 1024  # far over a name's limit, so that a name that is too long is refused as a name
_LANE_CHARS_MAX = 16
_PATH_CHARS_MAX = 255
_HOST_CHARS_MAX = 255
_U8 = (1 << 8) - 1
_U16 = (1 << 16) - 1
_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1
_U64 = (1 << 64) - 1


def _read_average(item: object) -> AverageSpec:
    if not isinstance(item, Mapping) or not isinstance(item.get("spec"), str) or not isinstance(item.get("name"), str):
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, f"{shown(item)} is not an average: name and spec")
    try:
        return parse_average(item["spec"], name=item["name"])
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None


def _read_config(value: object) -> str:
    """The text of a JSON object, unchanged: it becomes a file, byte for byte."""
    if not isinstance(value, str) or len(value.encode()) > CONFIG_BYTES_MAX:
        raise ValueError(value)
    try:
        is_object = isinstance(json.loads(value), dict)
    except RecursionError:
        is_object = False
    if not is_object:
        raise ValueError(value)
    return value


def _read_range(value: object) -> tuple[int, int]:
    first, last = list_of(integer(0, TENSORS_MAX - 1), 2).read(value)
    if first > last:
        raise ValueError(value)
    return first, last


_AVERAGE = Kind(_read_average, lambda average: {"name": average.name, "spec": average.spec})
_CHECKSUM = Kind(
    lambda value: optional(choice("crc32")).read(value) is not None, lambda checksum: "crc32" if checksum else None
)
_RANGE = Kind(_read_range, list)
_MANIFEST = Kind(manifests.from_json, Manifest.to_json)
_FILES = Kind(companions.from_json, companions.to_json)
_CHUNK_BYTES = integer(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
_DIGESTS = list_of(companions.SHA256, FILES_MAX)

_Byte: TypeAlias = Annotated[int, integer(0, _U8)]
_Step: TypeAlias = Annotated[int, integer(0, STEP_MAX)]
_OptionalStep: TypeAlias = Annotated[int | None, optional(integer(0, STEP_MAX))]
_Quantity: TypeAlias = Annotated[float | None, optional(QUANTITY)]
_Request: TypeAlias = _Step
_Capabilities: TypeAlias = Annotated[tuple[str, ...], list_of(text(CAPABILITY_CHARS_MAX), CAPABILITIES_MAX)]
_Error: TypeAlias = Annotated[str | None, optional(MESSAGE_TEXT)]
_InHeader: TypeAlias = Annotated[int, HEADER]


# From trainer to server.


@dataclass(frozen=True, slots=True)
class Hello(WithBody):
    """First message on a connection. `proof` answers the CHALLENGE of an earlier HELLO on the same connection."""

    type: ClassVar[int] = 1
    majors: Annotated[tuple[int, ...], list_of(integer(0, _U8), MAJORS_MAX)] = (VERSION_MAJOR,)
    minor: _Byte = VERSION_MINOR
    capabilities: _Capabilities = (CRC32,)
    proof: Annotated[str | None, optional(text(PROOF_CHARS_MAX))] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(WithBody):
    """Ask to stream a run: everything the server must know to create, continue or rewind it.

    `first_step` is the steps already taken + 1 in a session's first JOIN (`reconnect` false) and the next step to be
    sent in its later ones. `config` is the text of the versions' `config.json`. `samples_per_step` and
    `steps_per_epoch` apply until a later JOIN gives others. `world` ranks of one `gang`, one start of a training job,
    stream a run together, each the boxes of its manifest; `gang` is None where `world` is 1.
    `publish_every_steps` asks for a generation at least every so many steps, within the bounds of the server's own.
    The receiver checks the run's name, which has a reject code of its own. `host` and `pid` say where the trainer runs,
    for the refusal of another one that asks for the run. `files` are the companion files of its versions from now on;
    None leaves those that it has.
    """

    type: ClassVar[int] = 2
    run: Annotated[str, text(_RUN_CHARS_MAX)]
    first_step: Annotated[int, integer(1, STEP_MAX)]
    every: Annotated[int, integer(1, STEP_MAX)] = 1
    resume: Annotated[Resume, choice("auto", "never", "must")] = "auto"
    reconnect: Annotated[bool, FLAG] = False
    incarnation: Annotated[int, integer(0, _U63)] = 0
    checksum: Annotated[bool, _CHECKSUM] = False
    config: Annotated[str | None, optional(Kind(_read_config))] = None
    samples_per_step: _Quantity = None
    steps_per_epoch: _Quantity = None
    rank: Annotated[int, integer(0, _U32)] = 0
    world: Annotated[int, integer(1, _U32)] = 1
    averages: Annotated[tuple[AverageSpec, ...], list_of(_AVERAGE, AVERAGES_MAX)]
    manifest: Annotated[Manifest, _MANIFEST]
    publish_every_steps: Annotated[int | None, optional(integer(1, STEP_MAX), omit_none=True)] = None
    host: Annotated[str | None, optional(text(_HOST_CHARS_MAX), omit_none=True)] = None
    pid: Annotated[int | None, optional(integer(0, _U32), omit_none=True)] = None
    files: Annotated[tuple[FileSpec, ...] | None, optional(_FILES, omit_none=True)] = None
    gang: Annotated[str | None, optional(text(GANG_CHARS_MAX), omit_none=True)] = None

    @property
    def step_units(self) -> StepUnits:
        return StepUnits(self.samples_per_step, self.steps_per_epoch)


@dataclass(frozen=True, slots=True)
class Begin(WithBody):
    """A snapshot follows. `set` replaces the averages instead of updating them.

    `slot` says in which of the sender's shared slots it lies; None where chunks follow.
    """

    type: ClassVar[int] = 3
    step: _InHeader
    attempt: _InHeader
    mode: Annotated[Mode, choice("update", "set")] = "update"
    slot: Annotated[int | None, optional(integer(0, _U16), omit_none=True)] = None


@dataclass(frozen=True, slots=True)
class Chunk(WithBody):
    """`length` bytes of the snapshot from flat byte `offset`; the payload is the second frame."""

    type: ClassVar[int] = 4
    step: _InHeader
    attempt: _InHeader
    offset: _InHeader
    length: _InHeader
    crc32: Annotated[int | None, HEADER] = None


@dataclass(frozen=True, slots=True)
class Commit(WithBody):
    """The snapshot is complete: in how many chunks it was sent, none if it lies in shared memory, and its bytes."""

    type: ClassVar[int] = 5
    step: _InHeader
    attempt: _InHeader
    chunks: Annotated[int, integer(0, _U64)]
    nbytes: Annotated[int, integer(0, _U64, key="bytes")]


@dataclass(frozen=True, slots=True)
class Heartbeat(WithBody):
    """Sent by either side. `reply` asks the other side to answer with one that does not."""

    type: ClassVar[int] = 6
    reply: Annotated[bool, FLAG] = False


@dataclass(frozen=True, slots=True)
class Publish(WithBody):
    """Make what has been committed durable now; a PUBLISHED with the same `request` answers. `pin` keeps it longer."""

    type: ClassVar[int] = 7
    request: _Request
    pin: Annotated[bool, FLAG] = False


@dataclass(frozen=True, slots=True)
class Rewind(WithBody):
    """The trainer went back to the state after `step` steps: go back to the newest generation at or before it."""

    type: ClassVar[int] = 8
    request: _Request
    step: _Step


@dataclass(frozen=True, slots=True)
class Finish(WithBody):
    """The run is complete: publish it and mark it finished; answered by FINISHED."""

    type: ClassVar[int] = 9
    request: _Request


@dataclass(frozen=True, slots=True)
class Bye(WithBody):
    """The session ends; the run stays open."""

    type: ClassVar[int] = 10


@dataclass(frozen=True, slots=True)
class File(WithBody):
    """`length` bytes from byte `offset` of a companion file; the payload is the second frame.

    `place` is that of the file in JOINED's `missing_files`, from 0. The header carries it as `attempt`.
    """

    type: ClassVar[int] = 11
    place: int
    offset: int
    length: int
    crc32: int | None = None

    def header(self) -> dict[str, Any]:
        return {"attempt": self.place, "offset": self.offset, "length": self.length, "crc32": self.crc32}


@dataclass(frozen=True, slots=True)
class Skip(WithBody):
    """This rank of several sends no snapshot of a due step: the step is a gap for all of them."""

    type: ClassVar[int] = 12
    step: _InHeader
    why: Annotated[str, MESSAGE_TEXT]


# From server to trainer.


@dataclass(frozen=True, slots=True)
class Challenge(WithBody):
    """Answer to a HELLO without proof where a token is needed: prove it over this nonce (hex)."""

    type: ClassVar[int] = 64
    nonce: Annotated[str, text(NONCE_CHARS_MAX)]


@dataclass(frozen=True, slots=True)
class Welcome(WithBody):
    """The connection is accepted; the header's epoch identifies this start of the server.

    `shm` is the path of the unix socket on which the server takes shared slots, None without one.
    """

    type: ClassVar[int] = 65
    epoch: _InHeader
    major: _Byte = field(default=VERSION_MAJOR, kw_only=True)
    minor: _Byte = field(default=VERSION_MINOR, kw_only=True)
    chunk_bytes: Annotated[int, _CHUNK_BYTES]
    capabilities: _Capabilities = (CRC32,)
    shm: Annotated[str | None, optional(text(_PATH_CHARS_MAX), omit_none=True)] = None


@dataclass(frozen=True, slots=True)
class Joined(WithBody):
    """The session owns the run. Steps are those last applied and last durable, None when there is none.

    `recent` names the newest applied steps: a sender whose COMMITTED was lost finds its snapshot there, or learns that
    it was not applied. `set_aside` is the name under which an earlier run of this name is kept from now on.
    `lane` says how snapshots are sent: `zmq` in chunks, `shm` through the slots that the session has passed.
    `missing_files` has the sha256 of the JOIN's companion files that are to be sent; None if the JOIN has no `files`.
    `send` are ranges of indices, first and last, of the JOIN's tensors that this rank is to send, packed by the layout
    rule; None stands for all of them. `chunk_bytes` replaces that of WELCOME, unless it is None.
    """

    type: ClassVar[int] = 66
    last_step: _OptionalStep
    published_step: _OptionalStep
    recent: Annotated[tuple[int, ...], list_of(integer(0, STEP_MAX), RECENT_STEPS)]
    continuation: Annotated[Continuation, choice("new", "continued", "rewound")]
    credit: Annotated[int, integer(0, _U64)]
    lane: Annotated[str, text(_LANE_CHARS_MAX)] = ZMQ
    set_aside: Annotated[str | None, optional(text(NAME_CHARS_MAX), omit_none=True)] = None
    missing_files: Annotated[tuple[str, ...] | None, optional(_DIGESTS, omit_none=True)] = None
    send: Annotated[tuple[tuple[int, int], ...] | None, optional(list_of(_RANGE, TENSORS_MAX), omit_none=True)] = None
    chunk_bytes: Annotated[int | None, optional(_CHUNK_BYTES, omit_none=True)] = None


@dataclass(frozen=True, slots=True)
class Credit(WithBody):
    """How many chunks the sender may have sent on this connection in all. Never falls."""

    type: ClassVar[int] = 67
    limit: Annotated[int, integer(0, _U64)]


@dataclass(frozen=True, slots=True)
class Committed(WithBody):
    """The snapshot is applied in memory (or was before: commits are idempotent)."""

    type: ClassVar[int] = 68
    step: _InHeader
    attempt: _InHeader


@dataclass(frozen=True, slots=True)
class Published(WithBody):
    """A generation at `step` is durable. `request` echoes the PUBLISH that asked, None for a scheduled one.

    `error` says why a requested one could not be written; `step` is then the last durable one, None without any.
    """

    type: ClassVar[int] = 69
    step: _OptionalStep
    request: _OptionalStep = None
    error: _Error = None


@dataclass(frozen=True, slots=True)
class Rewound(WithBody):
    """The run is back at `step`; with `error`, nothing was changed and it says why."""

    type: ClassVar[int] = 70
    request: _Request
    step: _OptionalStep
    error: _Error = None


@dataclass(frozen=True, slots=True)
class Finished(WithBody):
    """The run is finished and durable at `step` (None when it never had a snapshot); with `error`, it is not.

    `warning` says what the user should know about the run's averages.
    """

    type: ClassVar[int] = 71
    request: _Request
    step: _OptionalStep
    error: _Error = None
    warning: Annotated[str | None, optional(MESSAGE_TEXT, omit_none=True)] = None


@dataclass(frozen=True, slots=True)
class Reject(WithBody):
    """Refused: why, and in words what to do. The header names the step and attempt of a refused snapshot."""

    type: ClassVar[int] = 72
    code: Annotated[RejectCode, choice(*RejectCode)]
    text: Annotated[str, MESSAGE_TEXT]
    step: _InHeader = 0
    attempt: _InHeader = 0

    @property
    def scope(self) -> Scope:
        return self.code.scope

    def body(self) -> dict[str, Any]:
        """The JSON body, with the scope for people: a reader knows it from the code."""
        return {"scope": self.scope, "code": self.code, "text": MESSAGE_TEXT.write(self.text)}


ControlMessage: TypeAlias = (
    Hello
    | Join
    | Begin
    | Commit
    | Heartbeat
    | Publish
    | Rewind
    | Finish
    | Bye
    | Skip
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
Message: TypeAlias = ControlMessage | Chunk | File  # the body of these two is a payload; all others have a JSON body
