"""A run in memory: its averages, ledgers and counters. The only mutable state of the averaging; it has one owner.

Comes in: a trainer's JOIN, then snapshots. Goes out: the averages' bytes, updated in place, and records of how they
stand. Threads, files, sessions and schedules are not known here. Memory is taken once, when the run is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ema_proto import messages
from ema_proto.limits import RECENT_STEPS
from ema_proto.manifest import Manifest
from ema_proto.messages import Mode
from ema_proto.specs import AverageSpec
from ema_server.crew import Crew
from ema_server.device import Device
from ema_server.kernel import BlockSink, Target
from ema_server.layout import Form, Segment, held_nbytes
from ema_server.ledger import Ledger
from ema_server.memory import Memory
from ema_server.records import AverageRecord, RunRecord
from ema_server.rules import Span, weight_of
from ema_server.tensorfile import TensorFile, files_of
from ema_server.treatment import form_of, segments_for


@dataclass(slots=True)
class Average:
    """One average of a run, as it stands."""

    rule: AverageSpec
    form: Form
    memory: Memory
    files: tuple[TensorFile, ...]
    ledger: Ledger
    updates: int = 0
    gap_steps: int = 0

    def target(self, number: int, then: int | None, now: int) -> Target:
        """What the kernel is to do at time `now`; `then` is the time of the last update, None for a replacement."""
        weight = None if then is None else weight_of(self.rule, Span(then, now, 0))
        return Target(self.memory.data, self.form, weight, number)

    def record(self) -> AverageRecord:
        """The average as values, a copy."""
        return AverageRecord(self.rule.name, self.rule.spec, self.updates, self.gap_steps, self.ledger.to_json())


@dataclass(slots=True)
class Run:
    """All averages of one run. Build with `new_run` or `restore.load_run`.

    `created` in RFC 3339; `origin` the steps already taken when it was first joined; `config` the text of its versions'
    `config.json`.
    """

    name: str
    manifest: Manifest
    segments: tuple[Segment, ...]
    averages: tuple[Average, ...]
    created: str
    origin: int
    every: int
    config: str | None
    exempt: frozenset[str] = frozenset()
    applied: int = 0
    gap_steps: int = 0
    quarantined: int = 0

    @property
    def last_step(self) -> int | None:
        """The last applied step, None before the first snapshot."""
        return self.averages[0].ledger.last_step

    @property
    def first_step(self) -> int | None:
        """The first applied step, None before the first snapshot."""
        return self.averages[0].ledger.first_step

    @property
    def recent(self) -> tuple[int, ...]:
        """The newest applied steps, increasing."""
        return self.averages[0].ledger.tail(RECENT_STEPS)

    @property
    def forms(self) -> tuple[Form, ...]:
        """How each average is held."""
        return tuple(average.form for average in self.averages)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the averages hold."""
        return sum(average.memory.nbytes for average in self.averages)

    def exempt_also(self, names: frozenset[str]) -> None:
        """Copy these tensors from now on instead of averaging them."""
        if names - self.exempt:
            self.exempt |= names
            self.segments = segments_for(self.manifest, self.exempt, [average.rule for average in self.averages])

    def apply(self, crew: Crew, step: int, mode: Mode, snapshot: torch.Tensor, sink: BlockSink | None) -> None:
        """Bring the snapshot of `step` into every average.

        The first one, and one of mode `set`, replaces the averages. Otherwise each rule weighs it for the true number
        of steps since the last one, so that neither gaps nor `every` change what a decay means.

        Args:
            crew: who does the arithmetic.
            step: above the last applied step (a `set` may repeat it).
            mode: `update` or `set`.
            snapshot: uint8, 1-D, `manifest.nbytes` long.
            sink: sees each block as it was before, None without.

        Raises:
            ValueError: `step` does not follow the last one.
        """
        last = self.last_step
        replaces = last is None or mode == "set"
        then = None if last is None or replaces else last - self.origin
        now = step - self.origin
        targets = [average.target(number, then, now) for number, average in enumerate(self.averages)]
        missing = 0 if last is None or replaces else (step - 1) // self.every - last // self.every
        for average in self.averages:
            average.ledger.append(step, replaces=replaces)
            average.updates += 1
            average.gap_steps += missing
        self.applied += 1
        self.gap_steps += missing
        crew.update(self.segments, snapshot, targets, sink)

    def record(self, last_step: int) -> RunRecord:
        """The run as values, a copy."""
        return RunRecord(
            run=self.name,
            step=last_step,
            created=self.created,
            origin=self.origin,
            every=self.every,
            manifest_digest=self.manifest.digest,
            exempt=tuple(sorted(self.exempt)),
            applied=self.applied,
            gap_steps=self.gap_steps,
            quarantined=self.quarantined,
            averages=tuple(average.record() for average in self.averages),
        )


def new_average(
    manifest: Manifest, rule: AverageSpec, ledger: Ledger, device: Device, memory: Memory | None = None
) -> Average:
    """An average without content.

    Args:
        manifest: the run's manifest.
        rule: its rule.
        ledger: its history.
        device: where it is to be.
        memory: bytes to use, of that device; None takes new ones.

    Raises:
        MemoryError: the device has not enough.
    """
    form = form_of(rule)
    held = memory if memory is not None else device.allocate(held_nbytes(manifest, form))
    return Average(rule, form, held, files_of(manifest, form), ledger)


def new_run(join: messages.Join, created: str, device: Device) -> Run:
    """The run that a first JOIN asks for. Steps up to the one before `first_step` are its origin.

    Raises:
        MemoryError: the device has not enough; the text says how much the averages need.
    """
    origin = join.first_step - 1
    try:
        averages = tuple(new_average(join.manifest, rule, Ledger(origin), device) for rule in join.averages)
    except MemoryError:
        needed = sum(held_nbytes(join.manifest, form_of(rule)) for rule in join.averages)
        text = f"{len(join.averages)} averages of this model need {needed} bytes of memory on {device.name}"
        raise MemoryError(text) from None
    return Run(
        name=join.run,
        manifest=join.manifest,
        segments=segments_for(join.manifest, frozenset(), join.averages),
        averages=averages,
        created=created,
        origin=origin,
        every=join.every,
        config=join.config,
    )
