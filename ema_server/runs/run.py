"""A run in memory: its averages, ledgers and counters. Its memory is taken once, when the run is made.

It has one owner, and knows nothing of threads, files, sessions and schedules.
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
from ema_server.storage.catalog import FileEntry
from ema_server.storage.records import RemovedRecord, RunRecord, StepUnitsRecord, newest_step_units
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, Segment, take_out
from ema_server.tensors.selection import segments_for

REMOVED_MAX = 1000  # every generation records them, and few trainers still list one
SPARES_MAX = 2  # with three averages, a check before the pass takes only an eighth longer
SPARE_FROM_BYTES = 8 << 20  # a smaller snapshot is still in cache after the check

STEP_UNITS_MAX = 1000  # every generation records them, and few sessions change them


@dataclass(slots=True)
class Run:
    """All averages of one run. Build with `new_run` or `restore.load_run`.

    Args:
        name: of the run.
        manifest: the tensors of its snapshots.
        averages: those that are updated, including any marked as removed.
        ledger: every applied step, whichever averages there were. Its origin is the number of steps already taken when
            the run was first joined.
        created: RFC 3339.
        every: the trainer sends the steps divisible by this.
        config: the text of its versions' `config.json`.
        files: companion files of its versions.
        exempt: names of the tensors that are copied because they were not finite in the first snapshot.
        applied, gap_steps, quarantined: counters since the run began.
        step_units_history: step units that trainers gave, oldest first.
        removed: averages that the run had.
        edits: changes of its averages since it came into memory.
        refused_step: the highest step quarantined since then, 0 without any.

    `_spares` is how many averages may have spare memory; `_is_suspect`: the last checked snapshot was not finite.
    """

    name: str
    manifest: Manifest
    averages: tuple[Average, ...]
    ledger: Ledger
    created: str
    every: int
    config: str | None
    files: tuple[FileEntry, ...] = ()
    exempt: frozenset[str] = frozenset()
    applied: int = 0
    gap_steps: int = 0
    quarantined: int = 0
    step_units_history: tuple[StepUnitsRecord, ...] = ()
    removed: tuple[RemovedRecord, ...] = ()
    edits: int = 0
    refused_step: int = 0
    segments: tuple[Segment, ...] = field(init=False)
    _check: FiniteCheck | None = field(init=False)
    _spares: int = SPARES_MAX
    _is_suspect: bool = False

    def __post_init__(self) -> None:
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
        """Samples per step and steps per epoch, as the trainer gave them."""
        return newest_step_units(self.step_units_history)

    @property
    def mark(self) -> tuple[int, int]:
        """Identifies a state of the run in memory: snapshots applied, changes of its averages."""
        return self.applied, self.edits

    @property
    def open_gap(self) -> int:
        """Steps after the last applied one that were due and refused. `gap_steps` has them once a later step comes."""
        return self._due_until(self.refused_step)

    @property
    def present(self) -> tuple[Average, ...]:
        """The averages without those marked as removed."""
        return tuple(average for average in self.averages if not average.is_removed)

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """The memory of the averages, in the order of the pool's targets."""
        return tuple(holding for average in self.averages for holding in average.holdings)

    @property
    def memory_bytes(self) -> int:
        return sum(average.nbytes for average in self.averages)

    def add(self, average: Average) -> None:
        """Update one more average from the next snapshot on. Its origin is the last applied step."""
        self.averages += (average,)
        self.edits += 1
        self._lay_out()

    def mark_removed(self, average: Average) -> None:
        """Stop recording this average. It is still updated, until `remove` or `unmark_removed`."""
        average.is_removed = True
        self.edits += 1
        gone = RemovedRecord(average.rule.name, average.rule.spec)
        self.removed = (*(removed for removed in self.removed if removed != gone), gone)[-REMOVED_MAX:]

    def unmark_removed(self, average: Average) -> None:
        average.is_removed = False
        self.edits += 1
        self.removed = tuple(gone for gone in self.removed if gone.name != average.rule.name)

    def remove(self, average: Average) -> None:
        """Stop updating it, and release its memory."""
        self.edits += not average.is_removed
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

    def not_finite(self, pool: WorkerPool, snapshot: torch.Tensor) -> tuple[str, ...]:
        """Names of the averaged float tensors with NaN or Inf in a snapshot, without those that are exempt."""
        found = pool.not_finite(self._finite_check(), snapshot)
        self._is_suspect = bool(found)
        return found

    def apply(
        self,
        pool: WorkerPool,
        step: int,
        mode: Mode,
        snapshot: torch.Tensor,
        sink: BlockSink | None,
        not_finite: frozenset[str] = frozenset(),
    ) -> frozenset[str]:
        """Update every average with the snapshot of `step`.

        The first one, and one of mode `set`, replaces the averages. Otherwise each rule weighs it for the true number
        of steps since the last one, so that neither gaps nor `every` change what a decay means.

        Args:
            pool: does the arithmetic.
            step: above the last applied step (a `set` may repeat it).
            mode: `update` or `set`.
            snapshot: uint8, 1-D, `manifest.nbytes` long.
            sink: sees each block before it changes, if there is one.
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
        if not_finite - self.exempt and (self.last_step is None or (donor is None and means)):
            self.exempt |= not_finite
            self._lay_out()
        donors = [average if average.has_content or donor is None else donor for average in self.averages]
        targets = self._advance(step, replaces=mode == "set")
        kept = not_finite - self.exempt
        if not kept:
            pool.update(self.segments, snapshot, list(chain(*targets)), sink)
            return kept
        others, alone = take_out(self.segments, (tensor for tensor in self.manifest.tensors if tensor.name in kept))
        pool.update(others, snapshot, list(chain(*targets)), sink)
        kept_targets = map(Average.keep, self.averages, targets, donors)
        pool.update(alone, snapshot, list(chain(*kept_targets)), sink)
        return kept

    def apply_if_finite(
        self, pool: WorkerPool, device: Device, step: int, mode: Mode, snapshot: torch.Tensor, sink: BlockSink | None
    ) -> bool:
        """Do as `apply` does in a pass that also checks the snapshot.

        Returns:
            False if that is not possible, or the snapshot is not finite: then the averages are what they were. What the
            sink has seen is still true.
        """
        if self._is_suspect or not pool.can_move or not self._has_spares(device):
            return False
        moves = [
            average.move(number, step, self.step_units, replaces=mode == "set")
            for number, average in enumerate(self.averages)
        ]
        if not pool.move(self.segments, snapshot, moves, self._finite_check(), sink):
            self._is_suspect = True
            return False
        self._advance(step, replaces=mode == "set")
        for average, move in zip(self.averages, moves, strict=True):
            if move.into is not None:
                average.has_moved()
        return True

    def plan_files(self) -> None:
        """Compute what a generation needs and takes seconds for very many tensors. Any thread may do it."""
        _ = self.manifest.digest
        for average in self.averages:
            _ = average.files.of_mean, average.files.of_snapshots

    @property
    def files_are_planned(self) -> bool:
        """Whether `plan_files` has nothing to do."""
        return all(average.files.are_planned for average in self.averages)

    def drop_spares(self) -> bool:
        """Free memory that only makes passes faster; returns whether there was any. None is taken from now on."""
        had = any(average.spare is not None for average in self.averages)
        for average in self.averages:
            average.spare = None
        self._spares = 0
        return had

    def refuse(self, step: int, mode: Mode) -> None:
        """Count a snapshot that is not applied. The step of an update is a gap."""
        self.quarantined += 1
        if mode == "update":
            self.refused_step = max(self.refused_step, step)

    def record(self, last_step: int) -> RunRecord:
        """A copy of the run as values."""
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

    def _finite_check(self) -> FiniteCheck:
        if self._check is None:
            self._check = FiniteCheck(self.manifest, self.exempt)
        return self._check

    def _has_spares(self, device: Device) -> bool:
        """Whether each average has spare memory; what is missing is taken, if there is enough and it is of use."""
        if self.manifest.nbytes < SPARE_FROM_BYTES or len(self.averages) > self._spares:
            return False
        for average in self.averages:
            if average.spare is None and not average.slots:
                average.spare = device.spare(average.memory.nbytes)
            if average.spare is None:
                self.drop_spares()
                return False
        return True

    def _due_until(self, step: int) -> int:
        return 0 if self.last_step is None else points(self.every, self.last_step, step)

    def _lay_out(self) -> None:
        self.segments = segments_for(self.manifest, self.exempt, [average.averaged for average in self.averages])
        self._check = None  # made when it is needed: its exempt tensors may have changed


def new_run(join: messages.Join, created: str, device: Device) -> Run:
    """The run that a first JOIN asks for. Its origin is the step before `first_step`.

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
