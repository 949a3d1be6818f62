"""Reads a run from a generation on disk into memory. Every file is checked against its sha256 before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ema_proto.averages.specs import parse_average
from ema_proto.wire.manifest import Manifest
from ema_server.compute.device import Device
from ema_server.compute.memory import Memory
from ema_server.rules.ledger import Ledger
from ema_server.rules.window import restored
from ema_server.runs.average import Average, new_average
from ema_server.runs.run import Run
from ema_server.storage.catalog import Generation
from ema_server.storage.disk import pread_into
from ema_server.storage.generation import AVERAGES_FOLDER, WINDOWS_FOLDER, read_manifest, read_record, verify
from ema_server.storage.records import CONFIG_FILE, AverageRecord, BrokenGeneration, RunRecord
from ema_server.tensors.file_plan import Span, TensorFile
from ema_server.tensors.safetensors_file import BadModelFile, data_shift


def load_run(
    generation: Generation, old: Mapping[str, Average], device: Device, record: RunRecord | None = None
) -> Run:
    """The run as it was at `generation`.

    Args:
        generation: a whole generation.
        old: averages of the run, by name, whose memory is used again where it fits. Overwritten even on failure.
        device: where the averages are to be, and those of `old` are.
        record: describes the run in place of the generation's own record. Averages with content are read from the
            generation's files, others begin with the next snapshot.

    Raises:
        BrokenGeneration: a file is not what it should be.
        OSError: the disk fails.
        MemoryError: the device has not enough.
    """
    folder = generation.folder
    own = read_record(folder)
    verify(folder, own)
    manifest = read_manifest(folder, own)
    run = own.run if record is None else record
    with _read_from_record("the run"):
        ledger = Ledger.from_json(run.ledger)
    return Run(
        name=generation.run,
        manifest=manifest,
        averages=tuple(_average(folder, manifest, kept, device, old.get(kept.name)) for kept in run.averages),
        ledger=ledger,
        created=run.created,
        every=run.every,
        config=_config(folder, run.averages),
        exempt=frozenset(run.exempt),
        applied=run.applied,
        gap_steps=run.gap_steps,
        quarantined=run.quarantined,
        removed=run.removed,
        step_units_history=run.step_units_history,
    )


def _average(folder: Path, manifest: Manifest, kept: AverageRecord, device: Device, old: Average | None) -> Average:
    with _read_from_record(f"average {kept.name}"):
        rule, ledger = parse_average(kept.spec, name=kept.name), Ledger.from_json(kept.ledger)
    held = new_average(manifest, rule, ledger, device, old)
    held.updates, held.gap_steps = kept.updates, kept.gap_steps
    held.age_steps, held.initial_share = kept.age_steps, kept.initial_share
    with _read_from_record(f"average {kept.name}"):
        held.entries = restored(kept.window, len(held.slots))
    for holding in held.holdings:
        inside = folder / (WINDOWS_FOLDER if holding.is_snapshot else AVERAGES_FOLDER) / kept.name
        for file in holding.files:
            _read(inside / file.name, file, holding.memory)
    return held


def _config(folder: Path, averages: Iterable[AverageRecord]) -> str | None:
    """The text of `config.json`, which every version of a generation has a copy of, None without."""
    for average in averages:
        path = folder / AVERAGES_FOLDER / average.name / CONFIG_FILE
        if average.has_content and path.exists():
            return path.read_bytes().decode()
    return None


@contextmanager
def _read_from_record(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # a LocalProtocolError is one
        raise BrokenGeneration(f"{what}: {error}") from None


def _read(path: Path, file: TensorFile, memory: Memory) -> None:
    """Read the spans that hold accumulators in full; a narrowed one has a file of its own."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        shift = data_shift(path, file.header)
        for span in file.spans:
            if not span.narrows:
                _fill(fd, replace(span, file_offset=span.file_offset + shift), memory)
    except (EOFError, BadModelFile) as error:
        raise BrokenGeneration(f"{path.name} of average {path.parent.name}: {error}") from None
    finally:
        os.close(fd)


def _fill(fd: int, span: Span, memory: Memory) -> None:
    memory.fill(span.begin, span.end, lambda data, at: pread_into(fd, data, span.file_offset + at - span.begin))
