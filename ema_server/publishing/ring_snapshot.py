"""One snapshot of a ring: a folder with the power averages of one generation.

A file is a hard link to the generation's own, or a copy with the averaged tensors in bfloat16. The record says which
tensors the average copies: synthesis takes them over instead of adding them up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ema_proto.averages.rules import PowerEma
from ema_proto.averages.specs import parse_average
from ema_server.config import RingDtype
from ema_server.storage.catalog import FileEntry, Generation, Version
from ema_server.storage.companions import Sources, sources_in
from ema_server.storage.disk import link_or_copy, sync_folders, write_durably
from ema_server.storage.generation import entry_of, read_manifest, read_record
from ema_server.storage.records import CONFIG_FILE, BrokenGeneration, dump, read_json
from ema_server.tensors.file_plan import MODEL_FILE
from ema_server.tensors.safetensors_file import Stored, describe, pieces_of, read_header
from ema_server.tensors.selection import copied_names

_RECORD_FILE = "snapshot.json"
_FILES_FOLDER = "files"


@dataclass(frozen=True, slots=True)
class RingMember:
    """One power average at the step of the snapshot.

    Args:
        average: its name.
        spec: its rule.
        gamma: the exponent of its profile.
        version: id of the version it was published as.
        updates: snapshots in it.
        gap_steps: steps missing in it.
        origin: the steps already taken when it began; its time counts from there.
        began: the last step whose weights replaced it; it holds nothing from before.
        file: its model file.
        copied: names of its tensors that are copies of the weights, not averages.
    """

    average: str
    spec: str
    gamma: float
    version: str
    updates: int
    gap_steps: int
    origin: int
    began: int
    file: FileEntry
    copied: frozenset[str]


@dataclass(frozen=True, slots=True)
class RingSnapshot:
    """The power averages of one generation, in `folder`; `dtype` is that of their averaged tensors.

    `files` are the companion files of the generation's versions.
    """

    folder: Path
    step: int
    dtype: RingDtype
    members: tuple[RingMember, ...]
    files: tuple[FileEntry, ...] = ()

    @property
    def companions(self) -> Sources:
        """The companion files, each with where its bytes are."""
        return {file: self.folder / _FILES_FOLDER / file.sha256 for file in self.files}

    @property
    def config(self) -> bytes | None:
        """The content of the versions' `config.json`, None if there is none."""
        path = self.folder / CONFIG_FILE
        return path.read_bytes() if path.exists() else None


def powers_of(generation: Generation) -> tuple[tuple[Version, PowerEma], ...]:
    """The versions of power averages in a generation, with their rules."""
    rules = ((version, parse_average(version.spec, name=version.average)) for version in generation.versions)
    return tuple((version, rule) for version, rule in rules if isinstance(rule, PowerEma))


def write_snapshot(folder: Path, generation: Generation, dtype: RingDtype) -> None:
    """Write the snapshot of a generation to `folder`, which must not exist, and sync it to the disk.

    Raises:
        BrokenGeneration: the generation's record or a file cannot be read.
        OSError: the disk refuses. The caller deletes the folder.
    """
    record = read_record(generation.folder)
    manifest, exempt = read_manifest(generation.folder, record), frozenset(record.run.exempt)
    ledgers = {average.name: average.ledger for average in record.run.averages}
    folder.mkdir()
    members = []
    for version, rule in powers_of(generation):
        copied = copied_names(manifest, exempt, rule)
        file = _place(version, folder / f"{version.average}.safetensors", dtype, copied)
        members.append(_member(version, rule.exponent, ledgers[version.average], file, copied))
    config = generation.versions[0].folder / CONFIG_FILE
    if config.exists():
        link_or_copy(config, folder / CONFIG_FILE)
    companions = sources_in(generation.versions[0])
    _link_files(companions, folder / _FILES_FOLDER)
    records = [{**asdict(member), "copied": sorted(member.copied)} for member in members]
    content = {"step": generation.step, "dtype": dtype, "members": records}
    if companions:
        content["files"] = [asdict(file) for file in companions]
    write_durably(folder / _RECORD_FILE, dump(content))
    sync_folders([folder])


def read_snapshot(folder: Path) -> RingSnapshot:
    """Read what `write_snapshot` wrote.

    Raises:
        BrokenGeneration: it is something else.
        OSError: it is not there, or the disk fails.
    """
    value = read_json((folder / _RECORD_FILE).read_bytes())
    try:
        dtype: RingDtype = "bfloat16" if value["dtype"] == "bfloat16" else "float32"
        members = tuple(_read_member(member) for member in value["members"])
        files = tuple(_read_file(file) for file in value.get("files", ()))
        return RingSnapshot(folder, int(value["step"]), dtype, members, files)
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenGeneration(f"{folder / _RECORD_FILE} is not the record of a snapshot: {error!r}") from None


def _member(
    version: Version, gamma: float, ledger: Mapping[str, Any], file: FileEntry, copied: frozenset[str]
) -> RingMember:
    return RingMember(
        average=version.average,
        spec=version.spec,
        gamma=gamma,
        version=version.id,
        updates=version.updates,
        gap_steps=version.gap_steps,
        origin=int(ledger["origin"]),
        began=int(ledger["set"][-1]),
        file=file,
        copied=copied,
    )


def _read_member(value: Mapping[str, Any]) -> RingMember:
    return RingMember(
        average=str(value["average"]),
        spec=str(value["spec"]),
        gamma=float(value["gamma"]),
        version=str(value["version"]),
        updates=int(value["updates"]),
        gap_steps=int(value["gap_steps"]),
        origin=int(value["origin"]),
        began=int(value["began"]),
        file=_read_file(value["file"]),
        copied=frozenset(map(str, value["copied"])),
    )


def _read_file(value: Mapping[str, Any]) -> FileEntry:
    return FileEntry(str(value["name"]), int(value["size"]), str(value["sha256"]))


def _link_files(companions: Sources, folder: Path) -> None:
    """Link companion files into a folder under their sha256."""
    by_digest = {file.sha256: source for file, source in companions.items()}
    if by_digest:
        folder.mkdir()
        for digest, source in by_digest.items():
            link_or_copy(source, folder / digest)
        sync_folders([folder])


def _place(version: Version, target: Path, dtype: RingDtype, copied: frozenset[str]) -> FileEntry:
    """Link the version's model file, or write it in bfloat16."""
    known = version.file(MODEL_FILE)
    if known is None:
        raise BrokenGeneration(f"version {version.id} has no {MODEL_FILE}")
    if dtype == "float32":
        link_or_copy(version.folder / MODEL_FILE, target)
        return FileEntry(target.name, known.size, known.sha256)
    stored = read_header(version.folder / MODEL_FILE)
    header, placed = describe((one.name, _narrow(one, copied), one.shape) for one in stored)
    with (version.folder / MODEL_FILE).open("rb") as reader, target.open("xb") as writer:
        writer.write(header)
        for old, new in zip(stored, placed, strict=True):
            for piece in pieces_of(reader.fileno(), old.offset, old.offset + old.nbytes):
                writer.write(piece if old.dtype == new.dtype else _narrowed(piece))
        writer.flush()
        os.fsync(writer.fileno())
    return entry_of(target.name, target)


def _narrow(stored: Stored, copied: frozenset[str]) -> str:
    return "BF16" if stored.dtype == "F32" and stored.name not in copied else stored.dtype


def _narrowed(piece: bytes) -> bytearray:
    """Float32 bytes as bfloat16, each rounded to the nearest."""
    narrow = bytearray(len(piece) // 2)
    wide = torch.frombuffer(bytearray(piece), dtype=torch.float32)
    torch.frombuffer(narrow, dtype=torch.bfloat16).copy_(wide)
    return narrow
