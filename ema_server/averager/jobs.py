"""What the ingest side and HTTP ask of the averager, and what it answers. Values only; nobody's thread is known here.

`reply` of a job is called exactly once, from the averager's thread, and must not block: the averager stands still while
it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

import torch

from ema_proto.averages.rules import AverageSpec
from ema_proto.errors import RejectCode
from ema_proto.wire import messages
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.messages import Continuation, Mode
from ema_server.storage.catalog import Version

Reason: TypeAlias = Literal[
    "schedule", "request", "checkpoint", "finish", "lost", "leave", "shutdown", "rewind", "change"
]


@dataclass(frozen=True, slots=True)
class Joined:
    """The session may stream. Steps are None before the first snapshot or generation.

    `manifest` is the run's own (its roles win over those of a later session), `exempt` the tensors that need no check,
    `recent` the newest applied steps, growing, at most `limits.RECENT_STEPS` of them (the ledger's tail).
    """

    last_step: int | None
    published_step: int | None
    continuation: Continuation
    manifest: Manifest
    exempt: frozenset[str]
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The session may not stream; `text` says what to do."""

    code: RejectCode
    text: str


@dataclass(frozen=True, slots=True)
class Applied:
    """The snapshot is in every average (or was before). `exempt` are the tensors that need no finite check any more."""

    step: int
    exempt: frozenset[str]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The snapshot is in no average, and nothing has changed; `text` says why."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Durable:
    """A generation at `step` is on disk (None: the run has had no snapshot). `new` says that it adds versions."""

    step: int | None
    versions: tuple[Version, ...]
    new: bool


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run is back at `step`, durably; `recent` as in `Joined`."""

    step: int
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not happen; `text` says why. What was there before still is."""

    text: str


@dataclass(frozen=True, slots=True)
class Changed:
    """The run has one average more, or one less, and that is durable."""

    average: str


class WhyNot(Enum):
    """Why the averages of a run were not changed."""

    NOT_STREAMING = "not_streaming"
    NO_SUCH_AVERAGE = "no_such_average"
    CONFLICT = "conflict"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_DURABLE = "not_durable"


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The averages of the run are what they were; `text` says why."""

    why: WhyNot
    text: str


@dataclass(frozen=True, slots=True)
class Join:
    """A session wants to stream the run."""

    run: str
    join: messages.Join
    reply: Callable[[Joined | Refused], None]


@dataclass(frozen=True, slots=True)
class Apply:
    """A whole snapshot lies in a slot.

    Args:
        data: uint8, 1-D, `manifest.nbytes` long, in the wire's layout; the averager reads it until it replies.
        not_finite: names of the averaged float tensors in which ingest found NaN or Inf.
    """

    run: str
    step: int
    mode: Mode
    data: torch.Tensor
    not_finite: tuple[str, ...]
    reply: Callable[[Applied | Quarantined], None]


@dataclass(frozen=True, slots=True)
class Publish:
    """Make the run's state durable; `checkpoint` keeps that generation beyond the newest ones."""

    run: str
    reason: Reason
    reply: Callable[[Durable | Failed], None]


@dataclass(frozen=True, slots=True)
class Rewind:
    """Go back to the newest generation at or before `step`."""

    run: str
    step: int
    reply: Callable[[Rewound | Failed], None]


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is complete: publish it and mark it finished."""

    run: str
    reply: Callable[[Durable | Failed], None]


@dataclass(frozen=True, slots=True)
class Leave:
    """The session is over (`lost`: it went silent): publish the run, then free its memory."""

    run: str
    lost: bool


@dataclass(frozen=True, slots=True)
class AddAverage:
    """Average the run by one more rule, from its next snapshot on."""

    run: str
    rule: AverageSpec
    reply: Callable[[Changed | Unchanged], None]


@dataclass(frozen=True, slots=True)
class RemoveAverage:
    """Average it no longer by the rule of this name. Versions stay as long as their generations do."""

    run: str
    average: str
    reply: Callable[[Changed | Unchanged], None]


Job: TypeAlias = Join | Apply | Publish | Rewind | Finish | Leave | AddAverage | RemoveAverage
