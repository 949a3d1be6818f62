"""From a generation on disk back to a run in memory. Every byte is checked against its sha256 before it counts."""

from __future__ import annotations

import os
from pathlib import Path

from ema_proto.errors import LocalProtocolError
from ema_proto.specs import AverageSpec, parse_average
from ema_server.catalog import Generation
from ema_server.device import Device
from ema_server.disk import pread_into
from ema_server.generation import AVERAGES_FOLDER, read_manifest, read_record, verify
from ema_server.ledger import Ledger
from ema_server.memory import Memory
from ema_server.records import CONFIG_FILE, AverageRecord, BrokenGeneration
from ema_server.run import Average, Run, new_average
from ema_server.tensorfile import Span, TensorFile
from ema_server.treatment import segments_for


def load_run(generation: Generation, memories: dict[str, Memory], device: Device) -> Run:
    """The run as it stood at `generation`.

    Args:
        generation: a whole generation.
        memories: memory to use again, by the name of the average; others are taken anew. Overwritten even on failure.
        device: where the averages are to be, and those of `memories` are.

    Raises:
        BrokenGeneration: a file is not what it should be.
        OSError: the disk fails.
        MemoryError: the device has not enough.
    """
    folder, name = generation.folder, generation.run
    record = read_record(folder)
    verify(folder, record)
    manifest = read_manifest(folder, record)
    averages: list[Average] = []
    for kept in record.run.averages:
        held = new_average(manifest, _rule(kept), _ledger(kept), device, memories.get(kept.name))
        held.updates, held.gap_steps = kept.updates, kept.gap_steps
        for file in held.files:
            _read(folder / AVERAGES_FOLDER / kept.name / file.name, file, held.memory)
        averages.append(held)
    config = folder / AVERAGES_FOLDER / averages[0].rule.name / CONFIG_FILE
    exempt = frozenset(record.run.exempt)
    return Run(
        name=name,
        manifest=manifest,
        segments=segments_for(manifest, exempt, [average.rule for average in averages]),
        averages=tuple(averages),
        created=record.run.created,
        origin=record.run.origin,
        every=record.run.every,
        config=config.read_bytes().decode() if config.exists() else None,
        exempt=exempt,
        applied=record.run.applied,
        gap_steps=record.run.gap_steps,
        quarantined=record.run.quarantined,
    )


def _rule(kept: AverageRecord) -> AverageSpec:
    try:
        return parse_average(kept.spec, name=kept.name)
    except LocalProtocolError as error:
        raise BrokenGeneration(f"average {kept.name}: {error}") from None


def _ledger(kept: AverageRecord) -> Ledger:
    try:
        return Ledger.from_json(kept.ledger)
    except ValueError as error:
        raise BrokenGeneration(f"average {kept.name}: {error}") from None


def _read(path: Path, file: TensorFile, memory: Memory) -> None:
    """Read back the spans that hold accumulators whole; a narrowed one has its own file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.pread(fd, len(file.header), 0) != file.header:
            raise BrokenGeneration(f"{path.name} of average {path.parent.name} has another layout than the manifest")
        for span in file.spans:
            if not span.narrows:
                _fill(fd, span, memory)
    except EOFError as error:
        raise BrokenGeneration(f"{path.name} of average {path.parent.name}: {error}") from None
    finally:
        os.close(fd)


def _fill(fd: int, span: Span, memory: Memory) -> None:
    memory.fill(span.begin, span.end, lambda data, at: pread_into(fd, data, span.file_offset + at - span.begin))
