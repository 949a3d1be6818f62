"""A run in memory: its averages, ledgers and counters. The only mutable state of the averaging; it has one owner.

Comes in: a trainer's JOIN, then snapshots. Goes out: the averages' bytes, updated in place, and records of how they
stand. Threads, files, sessions and schedules are not known here. Memory is taken once, when the run is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch

from ema_proto.averages.step_units import StepUnits
from ema_proto.limits import RECENT_STEPS
from ema_proto.wire import messages
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.messages import Mode
from ema_server.compute.device import Device
from ema_server.compute.kernel import BlockSink, Target
from ema_server.compute.pool import WorkerPool
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import points
from ema_server.runs.average import Average, Holding, needed_nbytes, new_average
from ema_server.storage.records import RemovedRecord, RunRecord, StepUnitsRecord, newest_step_units
from ema_server.tensors.layout import Form, Segment
from ema_server.tensors.selection import segments_for, segments_of

REMOVED_MAX = 1000  # trainers that list one of them still are few, and every generation carries them
STEP_UNITS_MAX = 1000  # sessions that change it are few, likewise


@dataclass(slots=True)
class Run:
    """All averages of one run. Build with `new_run` or `restore.load_run`.

    `ledger` has every applied step, whatever averages there were at the time; its origin is the steps already taken
    when the run was first joined. `created` in RFC 3339; `config` the text of its versions' `config.json`. `removed`
    are averages that it had. `step_units_history` has the units that trainers gave, oldest first. `edits` counts the
    changes of its averages since the run came into memory; `refused_step` is the highest step quarantined since then, 0
    without any.
    """

    name: str
    manifest: Manifest
    averages: tuple[Average, ...]
    ledger: Ledger
    created: str
    every: int
    config: str | None
    exempt: frozenset[str] = frozenset()
    applied: int = 0
    gap_steps: int = 0
    quarantined: int = 0
    step_units_history: tuple[StepUnitsRecord, ...] = ()
    removed: tuple[RemovedRecord, ...] = ()
    edits: int = 0
    refused_step: int = 0
    segments: tuple[Segment, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Lay the segments out."""
        self._lay_out()

    @property
    def last_step(self) -> int | None:
        """The last applied step, None before the first snapshot."""
        return self.ledger.last_step

    @property
    def first_step(self) -> int | None:
        """The first applied step, None before the first snapshot."""
        return self.ledger.first_step

    @property
    def recent(self) -> tuple[int, ...]:
        """The newest applied steps, increasing."""
        return self.ledger.tail(RECENT_STEPS)

    @property
    def step_units(self) -> StepUnits:
        """What the trainer told of its steps."""
        return newest_step_units(self.step_units_history)

    @property
    def mark(self) -> tuple[int, int]:
        """What tells a state of the run from an earlier one: snapshots applied, changes of its averages."""
        return self.applied, self.edits

    @property
    def open_gap(self) -> int:
        """Steps after the last applied one that were due and refused. `gap_steps` has them once a later step comes."""
        return self._due_until(self.refused_step)

    @property
    def present(self) -> tuple[Average, ...]:
        """The averages without those that are leaving."""
        return tuple(average for average in self.averages if not average.leaving)

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """What the averages hold, in the order of the pool's targets."""
        return tuple(holding for average in self.averages for holding in average.holdings)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the averages hold."""
        return sum(average.nbytes for average in self.averages)

    def exempt_also(self, names: frozenset[str]) -> None:
        """Copy these tensors from now on instead of averaging them."""
        if names - self.exempt:
            self.exempt |= names
            self._lay_out()

    def add(self, average: Average) -> None:
        """Have one more average. Its origin is the last applied step."""
        self.averages += (average,)
        self.edits += 1
        self._lay_out()

    def leave(self, average: Average) -> None:
        """Record the run without this average from now on; it is still updated, for `stay` or `drop` to follow."""
        average.leaving = True
        self.edits += 1
        gone = RemovedRecord(average.rule.name, average.rule.spec)
        self.removed = (*(removed for removed in self.removed if removed != gone), gone)[-REMOVED_MAX:]

    def stay(self, average: Average) -> None:
        """Record it again."""
        average.leaving = False
        self.edits += 1
        self.removed = tuple(gone for gone in self.removed if gone.name != average.rule.name)

    def drop(self, average: Average) -> None:
        """Have it no longer."""
        self.edits += not average.leaving
        self.averages = tuple(other for other in self.averages if other is not average)
        self._lay_out()

    def set_step_units(self, units: StepUnits) -> None:
        """Apply these step units from the next step; unset fields keep their values."""
        units = self.step_units.updated(units)
        if units != self.step_units:
            from_step = 1 + (self.ledger.origin if self.last_step is None else self.last_step)
            earlier = tuple(record for record in self.step_units_history if record.from_step < from_step)
            newest = StepUnitsRecord(from_step, units.samples_per_step, units.steps_per_epoch)
            self.step_units_history = (*earlier, newest)[-STEP_UNITS_MAX:]

    def apply(
        self,
        pool: WorkerPool,
        step: int,
        mode: Mode,
        snapshot: torch.Tensor,
        sink: BlockSink | None,
        not_finite: frozenset[str] = frozenset(),
    ) -> frozenset[str]:
        """Bring the snapshot of `step` into every average.

        The first one, and one of mode `set`, replaces the averages. Otherwise each rule weighs it for the true number
        of steps since the last one, so that neither gaps nor `every` change what a decay means.

        Args:
            pool: who does the arithmetic.
            step: above the last applied step (a `set` may repeat it).
            mode: `update` or `set`.
            snapshot: uint8, 1-D, `manifest.nbytes` long.
            sink: sees each block as it was before, None without.
            not_finite: names of buffers with NaN or Inf in the snapshot. No average has a finite value of them at the
                first snapshot: they are exempt from then on. Later they stay at their last finite value in every
                average, except in `raw`.

        Returns:
            The names of the buffers that stay at their last finite value.

        Raises:
            ValueError: `step` does not follow the last one.
        """
        means = [average for average in self.averages if average.form is not Form.WIRE]
        donor = next((average for average in means if average.has_content), None)
        if self.last_step is None or (donor is None and means):
            self.exempt_also(not_finite)
        donors = [average if average.has_content or donor is None else donor for average in self.averages]
        targets = self._advance(step, replaces=mode == "set")
        kept = not_finite - self.exempt
        pool.update(self._segments_without(kept), snapshot, list(chain(*targets)), sink)
        if kept:
            kept_targets = map(Average.keep, self.averages, targets, donors)
            pool.update(segments_of(self.manifest, kept), snapshot, list(chain(*kept_targets)), sink)
        return kept

    def refuse(self, step: int, mode: Mode) -> None:
        """Count a snapshot that is not applied. The step of an update is a gap."""
        self.quarantined += 1
        if mode == "update":
            self.refused_step = max(self.refused_step, step)

    def record(self, last_step: int) -> RunRecord:
        """The run as values, a copy."""
        return RunRecord(
            run=self.name,
            step=last_step,
            created=self.created,
            ledger=self.ledger.to_json(),
            every=self.every,
            manifest_digest=self.manifest.digest,
            exempt=tuple(sorted(self.exempt)),
            applied=self.applied,
            gap_steps=self.gap_steps,
            quarantined=self.quarantined,
            refused_step=self.refused_step,
            averages=tuple(average.record() for average in self.present),
            removed=self.removed,
            step_units_history=self.step_units_history,
        )

    def _advance(self, step: int, *, replaces: bool) -> list[tuple[Target, ...]]:
        missing = self.open_gap if replaces else self._due_until(step - 1)
        self.ledger.append(step, replaces=replaces)
        self.applied += 1
        self.gap_steps += missing
        return [
            average.advance(number, step, missing, self.step_units, replaces=replaces)
            for number, average in enumerate(self.averages)
        ]

    def _due_until(self, step: int) -> int:
        return 0 if self.last_step is None else points(self.every, self.last_step, step)

    def _segments_without(self, names: frozenset[str]) -> tuple[Segment, ...]:
        if not names:
            return self.segments
        return segments_for(self.manifest, self.exempt, [average.averaged for average in self.averages], names)

    def _lay_out(self) -> None:
        self.segments = segments_for(self.manifest, self.exempt, [average.averaged for average in self.averages])


def new_run(join: messages.Join, created: str, device: Device) -> Run:
    """The run that a first JOIN asks for. Steps up to the one before `first_step` are its origin.

    Raises:
        MemoryError: the device has not enough; the text says how much the averages need.
    """
    origin = join.first_step - 1
    try:
        averages = tuple(new_average(join.manifest, rule, Ledger(origin), device) for rule in join.averages)
    except MemoryError:
        needed = sum(needed_nbytes(join.manifest, rule) for rule in join.averages)
        text = f"{len(join.averages)} averages of this model need {needed} bytes of memory on {device.name}"
        raise MemoryError(text) from None
    return Run(join.run, join.manifest, averages, Ledger(origin), created, join.every, join.config)
