"""Messages from trainer to server, and the HEARTBEAT that both send. Each is a frozen value with its JSON body.

Which state may send what, and what it means, is SPEC.md's; here each message says only what it holds. Unknown keys are
ignored, so a minor version may add some. `codec` turns messages into frames and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from ema_proto.averages.specs import AverageSpec, parse_average
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import (
    AVERAGES_MAX,
    CONFIG_BYTES_MAX,
    MAJORS_MAX,
    PROOF_CHARS_MAX,
    STEP_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from ema_proto.wire import manifest as manifests
from ema_proto.wire.bodies import shown
from ema_proto.wire.fields import Fields
from ema_proto.wire.manifest import Manifest

Mode: TypeAlias = Literal["update", "set"]
Resume: TypeAlias = Literal["auto", "never", "must"]

_RUN_CHARS_MAX = 1024  # far over a name's limit, so that a name that is too long gets the answer for names
_U8 = (1 << 8) - 1
_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1
_U64 = (1 << 64) - 1


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
        """Validate what a peer sent."""
        return cls(
            majors=fields.integers("majors", MAJORS_MAX, _U8),
            minor=fields.integer("minor", 0, _U8),
            capabilities=fields.capabilities(),
            proof=fields.optional_text("proof", PROOF_CHARS_MAX),
        )


@dataclass(frozen=True, slots=True)
class Join:
    """Ask to stream a run: everything the server must know to create, continue or rewind it.

    `first_step` is the steps already taken + 1 in a session's first JOIN (`reconnect` false) and the next step to be
    sent in its later ones. `config` is the text of the versions' `config.json`. `rank` and `world` are reserved for
    sharded trainers. `step_units` hold until a later JOIN gives others.
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
    step_units: StepUnits = UNKNOWN

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
            "samples_per_step": self.step_units.samples_per_step,
            "steps_per_epoch": self.step_units.steps_per_epoch,
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
            step_units=StepUnits(
                fields.optional_quantity("samples_per_step"), fields.optional_quantity("steps_per_epoch")
            ),
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

    @classmethod
    def read(cls, fields: Fields) -> Begin:
        """Validate what a peer sent."""
        return cls(fields.step, fields.attempt, fields.choice("mode", ("update", "set")))


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

    @classmethod
    def read(cls, fields: Fields) -> Commit:
        """Validate what a peer sent."""
        return cls(fields.step, fields.attempt, fields.integer("chunks", 0, _U64), fields.integer("bytes", 0, _U64))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by either side. `reply` asks the other side to answer with one that does not."""

    type: ClassVar[int] = 6
    reply: bool = False

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"reply": self.reply}

    @classmethod
    def read(cls, fields: Fields) -> Heartbeat:
        """Validate what a peer sent."""
        return cls(fields.flag("reply"))


@dataclass(frozen=True, slots=True)
class Publish:
    """Make what has been committed durable now; a PUBLISHED with the same `request` answers. `pin` keeps it longer."""

    type: ClassVar[int] = 7
    request: int
    pin: bool = False

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "pin": self.pin}

    @classmethod
    def read(cls, fields: Fields) -> Publish:
        """Validate what a peer sent."""
        return cls(fields.request(), fields.flag("pin"))


@dataclass(frozen=True, slots=True)
class Rewind:
    """The trainer went back to the state after `step` steps: go back to the newest generation at or before it."""

    type: ClassVar[int] = 8
    request: int
    step: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request, "step": self.step}

    @classmethod
    def read(cls, fields: Fields) -> Rewind:
        """Validate what a peer sent."""
        return cls(fields.request(), fields.integer("step", 0, STEP_MAX))


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is complete: publish it and mark it finished; answered by FINISHED."""

    type: ClassVar[int] = 9
    request: int

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {"request": self.request}

    @classmethod
    def read(cls, fields: Fields) -> Finish:
        """Validate what a peer sent."""
        return cls(fields.request())


@dataclass(frozen=True, slots=True)
class Bye:
    """The session ends; the run stays open."""

    type: ClassVar[int] = 10

    def body(self) -> dict[str, Any]:
        """JSON body."""
        return {}

    @classmethod
    def read(cls, fields: Fields) -> Bye:
        """Validate what a peer sent."""
        return cls()


def _average(item: object) -> AverageSpec:
    if not isinstance(item, Mapping) or not isinstance(item.get("spec"), str) or not isinstance(item.get("name"), str):
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, f"{shown(item)} is not an average: name and spec")
    try:
        return parse_average(item["spec"], name=item["name"])
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None


def _config(fields: Fields) -> str | None:
    """The text of a JSON object, kept as it is: it becomes a file, byte for byte."""
    text = fields.optional_text("config", CONFIG_BYTES_MAX)
    if text is None:
        return None
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object or len(text.encode()) > CONFIG_BYTES_MAX:
        raise fields.bad("config")
    return text
