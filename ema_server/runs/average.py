"""One average of a run: its rule, its memory and its history. The run owns it, and nothing else changes it.

It turns the steps of snapshots into targets for the kernel; it sees no snapshot's bytes, no thread and no folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ema_proto.averages.rules import AverageSpec, Bema, Window
from ema_proto.averages.step_units import StepUnits
from ema_proto.wire.manifest import Manifest
from ema_server.compute.device import Device
from ema_server.compute.kernel import Move, Source, Target
from ema_server.compute.memory import Memory
from ema_server.rules.correction import begins, correction_of, factor_at
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import Span, is_copied, points, weight_of
from ema_server.rules.window import Entries, Entry, blends, entered, mean_age, share_of
from ema_server.storage.records import AverageRecord
from ema_server.tensors.file_plan import TensorFile, accumulator_file, files_of, snapshot_file
from ema_server.tensors.layout import Form, held_nbytes
from ema_server.tensors.selection import averaged_names, form_of


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory of an average: the form of its bytes, and the files in which a generation stores them."""

    memory: Memory
    form: Form
    files: tuple[TensorFile, ...]
    is_snapshot: bool


class AverageFiles:
    """The files of an average and of its snapshots. Laid out at the first use: many tensors take long."""

    def __init__(self, manifest: Manifest, rule: AverageSpec) -> None:
        self._manifest = manifest
        self._rule = rule

    @property
    def are_planned(self) -> bool:
        """Whether they have been laid out."""
        return "of_mean" in self.__dict__ and "of_snapshots" in self.__dict__

    @cached_property
    def of_mean(self) -> tuple[TensorFile, ...]:
        return files_of(self._manifest, form_of(self._rule))

    @cached_property
    def of_snapshots(self) -> tuple[TensorFile, ...]:
        """Of a window, one for each of its slots; of a `bema`, of the initial weights and of the moving average."""
        manifest, rule = self._manifest, self._rule
        if isinstance(rule, Bema):
            moving = accumulator_file(manifest, form_of(rule), "moving.safetensors")
            return snapshot_file(manifest, "initial.safetensors"), moving
        if not isinstance(rule, Window):
            return ()
        snapshot = snapshot_file(manifest, "")
        return tuple(replace(snapshot, name=f"{index:03d}.safetensors") for index in range(rule.k))


@dataclass(slots=True)
class Average:
    """One average in memory. Build with `new_average`.

    `averaged` names the tensors that it averages where they can be. `slots` hold the snapshots of a window, `entries`
    say which; those of a `bema` hold its initial weights, which are the only entry, and its moving average.
    `age_steps` is the mean age of the weights inside (for a `bema`, inside its moving average); `initial_share` the
    share of the weights that it began from: of the last snapshot that it copied because it did not average yet, or of
    the last `set`. With `is_removed` it is still updated, but no longer recorded. `spare` is memory in which the next
    state can be written while this one stays.
    """

    rule: AverageSpec
    averaged: frozenset[str]
    memory: Memory
    files: AverageFiles
    slots: tuple[Memory, ...]
    ledger: Ledger
    entries: Entries = ()
    updates: int = 0
    gap_steps: int = 0
    age_steps: float = 0.0
    initial_share: float = 1.0
    is_removed: bool = False
    spare: Memory | None = None

    @property
    def form(self) -> Form:
        return form_of(self.rule)

    @property
    def has_content(self) -> bool:
        """Whether a snapshot has been applied to it."""
        return self.ledger.last_step is not None

    @property
    def nbytes(self) -> int:
        spare = 0 if self.spare is None else self.spare.nbytes
        return self.memory.nbytes + spare + sum(slot.nbytes for slot in self.slots)

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """Its memory, in the order of `advance`'s targets. Without files if a generation would not store it."""
        is_kept = self.has_content and not self.is_removed
        mean = Holding(self.memory, self.form, self.files.of_mean if is_kept else (), False)
        if isinstance(self.rule, Bema):
            initial, moving = self.slots
            files = self.files.of_snapshots if is_kept else ()
            return (
                Holding(initial, Form.WIRE, files[:1], is_snapshot=True),
                mean,
                Holding(moving, self.form, files[1:], is_snapshot=True),
            )
        order = {entry.slot: index for index, entry in enumerate(self.entries)} if is_kept else {}
        snapshots = (
            Holding(slot, Form.WIRE, self.files.of_snapshots[order[index] :][:1] if index in order else (), True)
            for index, slot in enumerate(self.slots)
        )
        return (*snapshots, mean)

    def advance(
        self, number: int, step: int, gap_steps: int, units: StepUnits, *, replaces: bool
    ) -> tuple[Target, ...]:
        """Record the snapshot of `step`; returns what the kernel is to do with it.

        Args:
            number: the average's bit in the segments' masks.
            step: of the snapshot.
            gap_steps: steps that were due before it and are missing.
            units: samples per step and steps per epoch, as the trainer gave them.
            replaces: the snapshot replaces the average whatever the rule says; the first one always does.
        """
        self.gap_steps += gap_steps if self.has_content else 0
        previous = None if replaces else self.ledger.last_step
        self.ledger.append(step, replaces=replaces)
        self.updates += 1
        if isinstance(self.rule, Window):
            targets = self._slide(self.rule, number, previous, step)
        elif isinstance(self.rule, Bema):
            targets = self._correct(self.rule, number, previous, step)
        else:
            span = self._span(previous, step)
            weight = None if span is None else weight_of(self.rule, span, units)
            left = 0.0 if weight is None else 1.0 - weight
            begins = span is None or is_copied(self.rule, span)
            self.initial_share = 1.0 if begins else left * self.initial_share
            self.age_steps = 0.0 if previous is None else left * (self.age_steps + step - previous)
            targets = (Target(self.memory.data, self.form, weight, number),)
        return targets

    def move(self, number: int, step: int, units: StepUnits, *, replaces: bool) -> Move:
        """What the kernel is to do with the snapshot of `step` instead of what `advance` says; nothing is recorded.

        The next state is written to the spare memory, which `has_moved` makes the average's own. Only for an average
        with spare memory and one target. The arguments are those of `advance`.
        """
        span = self._span(None if replaces else self.ledger.last_step, step)
        weight = None if span is None else weight_of(self.rule, span, units)
        target = Target(self.memory.data, self.form, weight, number)
        return Move(target, None if weight == 0.0 or self.spare is None else self.spare.data)

    def has_moved(self) -> None:
        """The next state is in the spare memory: the average is there from now on."""
        if self.spare is not None:
            self.memory, self.spare = self.spare, self.memory

    def keep(self, targets: tuple[Target, ...], donor: Average) -> tuple[Target, ...]:
        """Returns what the kernel is to do with tensors of the snapshot that are not finite.

        They stay as they are. Where the snapshot begins the average, or enters a window, there is no older value:
        these take the donor's. `raw` keeps the bytes that were sent.

        Args:
            targets: what `advance` returned for the other tensors.
            donor: an average that had content before; this one, if it had.
        """
        if self.form is Form.WIRE:
            return targets
        lent = (Source(donor.memory.data, donor.form),)
        if isinstance(self.rule, Bema) and targets[0].weight == 0.0:
            return tuple(replace(target, weight=0.0) for target in targets)

        def kept(target: Target) -> Target:
            if target.data is self.memory.data:
                return replace(target, weight=0.0) if donor is self else replace(target, weight=None, mix=lent)
            return replace(target, mix=lent)

        return tuple(map(kept, targets))

    def record(self) -> AverageRecord:
        """A copy of the average as values."""
        return AverageRecord(
            name=self.rule.name,
            spec=self.rule.spec,
            updates=self.updates,
            gap_steps=self.gap_steps,
            age_steps=self.age_steps,
            initial_share=self.initial_share,
            window=tuple((entry.step, entry.count) for entry in self.entries),
            ledger=self.ledger.to_json(),
        )

    def _span(self, previous: int | None, step: int) -> Span | None:
        """The steps that the snapshot stands for, None if it begins the average."""
        return None if previous is None else Span(previous, step, self.ledger.origin)

    def _slide(self, rule: Window, number: int, previous: int | None, step: int) -> tuple[Target, ...]:
        """Put a snapshot that is due into a slot, and compute the mean again. Before the first one, copy the snapshot.

        With `previous` None the snapshot begins the average and stands for all steps since the origin.
        """
        before = () if previous is None else self.entries
        due = points(rule.every, self.ledger.origin if previous is None else previous, step)
        self.entries = entered(before, len(self.slots), step, due)
        follows = not self.entries
        self.age_steps = mean_age(self.entries, step)
        initial_step = self.ledger.set_steps[-1]
        self.initial_share = float(step == initial_step) if follows else share_of(self.entries, initial_step)
        taken = self.entries[-1].slot if due else None
        weights = (None if index == taken else 0.0 for index in range(len(self.slots)))
        snapshots = (Target(slot.data, Form.WIRE, weight) for slot, weight in zip(self.slots, weights, strict=True))
        weights_inside = zip(self.entries, blends(self.entries), strict=True)
        mix = tuple(Source(self.slots[entry.slot].data, Form.WIRE, weight) for entry, weight in weights_inside)
        mean = Target(self.memory.data, self.form, None if due or follows else 0.0, number, mix)
        return (*snapshots, mean)

    def _correct(self, rule: Bema, number: int, previous: int | None, step: int) -> tuple[Target, ...]:
        """Update the moving average and correct its bias, if an update is due. Before the first one, copy the snapshot.

        With `previous` None the snapshot begins the average.
        """
        initial, moving = self.slots
        span = None if previous is None else Span(previous, step, self.ledger.origin)
        if span is None or begins(rule, span):
            self.entries = (Entry(step, 1, 0),)
            self.age_steps, self.initial_share = 0.0, 1.0
            return self._targets(number, None, None, None)
        correction = correction_of(rule, span)
        self.age_steps += step - span.last
        if correction is None:
            return self._targets(number, 0.0, 0.0, 0.0)
        left = 1.0 - correction.weight
        self.age_steps *= left
        began = self.initial_share + factor_at(rule, span.last, self.ledger.origin)
        self.initial_share = left * began - correction.factor
        of_snapshot, of_initial = correction.mix
        mix = (
            Source(moving.data, self.form),
            Source(None, Form.WIRE, of_snapshot),
            Source(initial.data, Form.WIRE, of_initial),
        )
        first, mean, average = self._targets(number, 0.0, None, correction.weight)
        return (first, replace(mean, mix=mix), average)

    def _targets(
        self, number: int, initial: float | None, mean: float | None, moving: float | None
    ) -> tuple[Target, Target, Target]:
        """The targets of a `bema` with these weights, in the order of `holdings`."""
        first, last = self.slots
        return (
            Target(first.data, Form.WIRE, initial),
            Target(self.memory.data, self.form, mean, number),
            Target(last.data, self.form, moving, number),
        )


def needed_nbytes(manifest: Manifest, rule: AverageSpec) -> int:
    """Bytes of memory that an average of this rule takes: its mean, and its slots."""
    return held_nbytes(manifest, form_of(rule)) + sum(_slot_sizes(manifest, rule))


def new_average(
    manifest: Manifest, rule: AverageSpec, ledger: Ledger, device: Device, old: Average | None = None
) -> Average:
    """An average without content. If `old`, of the same manifest and device, has the same rule, it gives its memory.

    Raises:
        MemoryError: the device has not enough.
    """
    spare: Memory | None = None
    if old is not None and old.rule.spec == rule.spec:
        memory, slots, spare = old.memory, old.slots, old.spare
    else:
        memory = device.allocate(held_nbytes(manifest, form_of(rule)))
        slots = tuple(map(device.allocate, _slot_sizes(manifest, rule)))
    return Average(
        rule, averaged_names(manifest, rule), memory, AverageFiles(manifest, rule), slots, ledger, spare=spare
    )


def _slot_sizes(manifest: Manifest, rule: AverageSpec) -> tuple[int, ...]:
    if isinstance(rule, Bema):
        return manifest.nbytes, held_nbytes(manifest, form_of(rule))
    return (manifest.nbytes,) * rule.k if isinstance(rule, Window) else ()
