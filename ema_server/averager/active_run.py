"""What is under way for one run besides its averages: session, generations in the making, jobs that wait. Values only.

It is the averager's bookkeeping and has its thread alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from ema_server.averager.jobs import Durable, Failed, Job, Reason
from ema_server.publishing.publisher import PublishResult, SealOrder
from ema_server.publishing.writer import GenerationWriter
from ema_server.runs.rate import Rate
from ema_server.runs.run import Run
from ema_server.runs.status_store import NonFiniteBuffers, Quarantine, RunState
from ema_server.storage.catalog import Generation

Outcome: TypeAlias = Durable | Failed


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """Someone wants the run durable as it stands, and is told."""

    reason: Reason
    then: Callable[[Outcome], None]

    @property
    def pins(self) -> bool:
        """Whether the generation is kept beyond the newest ones."""
        return self.reason == "checkpoint"

    @property
    def finishes(self) -> bool:
        """Whether the generation is the run's last."""
        return self.reason == "finish"


@dataclass(frozen=True, slots=True)
class PendingGeneration:
    """A generation that the publisher is working on.

    `mark` is the run's as it holds it, None for an older generation made the newest;
    `land` is called with how it ended.
    """

    mark: tuple[int, int] | None
    pinned: bool
    finished: bool
    land: Callable[[PublishResult], None]
    wants: list[PublishRequest]


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """A draft that the next snapshot's pass writes, and the order to give afterwards."""

    draft: GenerationWriter
    order: SealOrder


@dataclass(slots=True)
class ActiveRun:
    """One run's course in the averager.

    `session` counts joins, so that an answer to an earlier one is known as such. While `held` is not empty, or
    `barrier` is set, every further job of the run is held too, in order. `refused` counts the snapshots quarantined
    since the last applied one.
    """

    name: str
    next_seq: int
    begun_at: float
    rate: Rate
    run: Run | None = None
    state: RunState = RunState.WAITING
    session: int = 0
    departed: bool = False
    generation: Generation | None = None
    saved: tuple[int, int] = (0, 0)
    begun_step: int = 0
    airborne: PendingGeneration | None = None
    boarding: OpenDraft | None = None
    waiting: list[PublishRequest] = field(default_factory=list)
    held: deque[Job] = field(default_factory=deque)
    barrier: bool = False
    publish_error: str | None = None
    retry_at: float = 0.0
    quarantine: Quarantine | None = None
    refused: int = 0
    nonfinite_buffers: NonFiniteBuffers | None = None

    @property
    def last_step(self) -> int | None:
        """The last step applied in memory, None without any."""
        return self.run.last_step if self.run is not None else None

    @property
    def published_step(self) -> int | None:
        """The step of the newest generation, None without any."""
        return self.generation.step if self.generation is not None else None

    @property
    def is_changed(self) -> bool:
        """Whether memory holds more than the newest generation."""
        return self.run is not None and self.run.mark != self.saved

    @property
    def has_news(self) -> bool:
        """Whether memory holds snapshots that the newest generation does not."""
        return self.run is not None and self.run.applied != self.saved[0]

    @property
    def is_quiet(self) -> bool:
        """Whether no generation is in the making."""
        return self.airborne is None and self.boarding is None

    def take_seq(self) -> int:
        """The number of the next generation; none is given twice."""
        self.next_seq += 1
        return self.next_seq - 1
