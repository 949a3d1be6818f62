"""What ingest and HTTP ask of the averager, what it answers, and the queue between them."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Generic, Literal, TypeAlias, TypeVar

import torch

from ema_proto.averages.rules import AverageSpec
from ema_proto.errors import RejectCode
from ema_proto.wire import messages
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.messages import Continuation, Mode
from ema_server.publishing.publisher import PublishResult
from ema_server.storage.catalog import FileEntry, Version

Reason: TypeAlias = Literal[
    "schedule", "request", "checkpoint", "finish", "lost", "leave", "shutdown", "rewind", "change"
]

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class Joined:
    """The session may stream. Steps are None before the first snapshot or generation.

    `manifest` is the run's own (its roles win over those of a later session), `exempt` the tensors that need no finite
    check, `recent` the newest applied steps, increasing, at most `limits.RECENT_STEPS` of them, `set_aside` the name
    that an earlier run of this name has now, `missing_files` the sha256 of the companion files that are to be sent.
    """

    last_step: int | None
    published_step: int | None
    continuation: Continuation
    manifest: Manifest
    exempt: frozenset[str]
    recent: tuple[int, ...]
    set_aside: str | None = None
    missing_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The session may not stream; `text` says what to do."""

    code: RejectCode
    text: str


@dataclass(frozen=True, slots=True)
class Applied:
    """The snapshot is in every average, now or since an earlier job. `exempt` as in `Joined`."""

    step: int
    exempt: frozenset[str]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The snapshot is in no average; `text` says why."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class NotInMemory:
    """The run had an internal error and was taken out of memory: its session has to join again. `text` says why."""

    text: str


@dataclass(frozen=True, slots=True)
class Durable:
    """A generation at `step` is on disk (None: the run has had no snapshot). `new` says that it adds versions.

    `warning` is what the user of a finished run should know.
    """

    step: int | None
    versions: tuple[Version, ...]
    new: bool
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run is back at `step`, durably; `recent` as in `Joined`."""

    step: int
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """It was not done; `text` says why. The disk holds what it held before."""

    text: str


@dataclass(frozen=True, slots=True)
class Changed:
    """The run has one average more, or one less, and that is durable."""

    average: str


@dataclass(frozen=True, slots=True)
class Deleted:
    """The run is deleted, durably; its files are erased in the background."""


class WhyNot(Enum):
    NO_SUCH_RUN = "no_such_run"
    STREAMING = "streaming"
    NOT_STREAMING = "not_streaming"
    NO_SUCH_AVERAGE = "no_such_average"
    CONFLICT = "conflict"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_DURABLE = "not_durable"


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The run is what it was; `text` says why."""

    why: WhyNot
    text: str


Outcome: TypeAlias = Durable | Failed


@dataclass(frozen=True, slots=True)
class Join:
    """A session wants to stream the run."""

    run: str
    join: messages.Join
    reply: Callable[[Joined | Refused], None]


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply a whole snapshot. The averager reads `data` (uint8, 1-D, in the wire's layout) until it replies.

    `not_finite` names the averaged float tensors with NaN or Inf; None if nothing has been checked yet, so that the
    averager does.
    """

    run: str
    step: int
    mode: Mode
    data: torch.Tensor
    not_finite: tuple[str, ...] | None
    reply: Callable[[Applied | Quarantined | NotInMemory], None]


@dataclass(frozen=True, slots=True)
class Publish:
    """Make the run's state durable; `checkpoint` keeps that generation beyond the newest ones."""

    run: str
    reason: Reason
    reply: Callable[[Outcome], None]


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
    reply: Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Leave:
    """The session is over (`lost`: it went silent): publish the run, then free its memory."""

    run: str
    lost: bool


@dataclass(frozen=True, slots=True)
class UseFiles:
    """The companion files that the run's JOIN lists are all stored: publish later snapshots with them."""

    run: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class AddAverage:
    """Average the run by one more rule, from its next snapshot on."""

    run: str
    rule: AverageSpec
    reply: Callable[[Changed | Unchanged], None]


@dataclass(frozen=True, slots=True)
class RemoveAverage:
    """Stop averaging by the rule of this name. Its versions stay as long as their generations do."""

    run: str
    average: str
    reply: Callable[[Changed | Unchanged], None]


@dataclass(frozen=True, slots=True)
class DeleteRun:
    """Delete the run with everything that belongs to it, unless a trainer streams it."""

    run: str
    reply: Callable[[Deleted | Unchanged], None]


Job: TypeAlias = Join | UseFiles | Apply | Publish | Rewind | Finish | Leave | AddAverage | RemoveAverage | DeleteRun


def refuse(job: Job, text: str, why: WhyNot = WhyNot.NOT_DURABLE) -> None:
    """Answer a job with the failure that its kind of answer has."""
    match job:
        case Join():
            job.reply(Refused(RejectCode.UNAVAILABLE, text))
        case Apply():
            job.reply(NotInMemory(text))
        case AddAverage() | RemoveAverage() | DeleteRun():
            job.reply(Unchanged(why, text))
        case Publish() | Rewind() | Finish():
            job.reply(Failed(text))
        case Leave() | UseFiles():
            return


_Answer = TypeVar("_Answer")


class Reply(Generic[_Answer]):
    """Delivers the answer of one job, once. It runs on the thread that carries out the job: `deliver` must not block.

    A second answer is dropped: it is the failure of a job that had been answered before it failed. An error of
    `deliver` is logged, counted by `count_error`, and goes no further, because it says nothing about the run.
    """

    def __init__(self, deliver: Callable[[_Answer], None], count_error: Callable[[], None]) -> None:
        self._deliver = deliver
        self._count_error = count_error
        self._is_answered = False

    def __call__(self, answer: _Answer) -> None:
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self._deliver(answer)
        except Exception:
            self._count_error()
            logger.exception("the answer %r could not be delivered", answer)


@dataclass(frozen=True, slots=True)
class PublishDone:
    """The publisher has carried out the run's order."""

    run: str
    result: PublishResult


@dataclass(frozen=True, slots=True)
class JoinDone:
    """A JOIN of the run was carried out, or waits among the run's held jobs (`is_held`) until the run is idle."""

    run: str
    is_held: bool


@dataclass(frozen=True, slots=True)
class PublishDue:
    """A generation of the run is due: a snapshot was applied on another thread, which must not wait for the disk."""

    run: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Publish every run and end."""


Item: TypeAlias = Job | PublishDone | JoinDone | PublishDue | Stop


_STOPPING = ""  # no run has this name


def _owner(item: Item) -> str:
    return _STOPPING if isinstance(item, Stop) else item.run


class JobQueue:
    """Items for the averager, from any thread. Its senders bound it: two snapshots and one request for each run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unfinished: Counter[str] = Counter()
        self._items: deque[Item] = deque()
        self._added: SimpleQueue[None] = SimpleQueue()  # one for each item: it waits with less work than a Condition

    def put(self, item: Item) -> None:
        """Add an item; never blocks for longer than the lock is held."""
        with self._lock:
            self._items.append(item)
            self._unfinished[_owner(item)] += 1
        self._added.put(None)

    def take(self, timeout_s: float) -> Item | None:
        """The oldest item, None if there is none within `timeout_s`. Only one thread may call it."""
        try:
            self._added.get(timeout=timeout_s)
        except Empty:
            return None
        with self._lock:
            return self._items.popleft()

    def finished(self, item: Item) -> None:
        """An item that was taken is dealt with."""
        with self._lock:
            self._unfinished[_owner(item)] -= 1
            if not self._unfinished[_owner(item)]:
                del self._unfinished[_owner(item)]

    @property
    def is_idle(self) -> bool:
        """Whether every item that was put is dealt with."""
        return not self._unfinished

    def has_unfinished(self, run: str) -> bool:
        """Whether an item of the run that was put is not dealt with, or the averager is to end."""
        with self._lock:
            return run in self._unfinished or _STOPPING in self._unfinished

    def snapshot_is_next(self, run: str) -> bool:
        """Whether the next job for `run`, requests to publish apart, is a snapshot."""
        with self._lock:
            items = (item for item in self._items if not isinstance(item, Stop | Publish) and item.run == run)
            return isinstance(next(items, None), Apply)

    def __len__(self) -> int:
        return len(self._items)
