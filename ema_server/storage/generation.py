"""A generation's folder, read and verified.

A generation is whole if `generation.json` can be read and every file that it names exists with its size. `verify`
checks the content, before the averages are resumed from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ema_proto.errors import RemoteProtocolError
from ema_proto.names import OWN_FILES
from ema_proto.wire import manifest as manifests
from ema_proto.wire.manifest import Manifest
from ema_server.storage.catalog import FileEntry, Generation, Version
from ema_server.storage.disk import sha256
from ema_server.storage.records import (
    GENERATION_FILE,
    MANIFEST_FILE,
    SECOND_NAMES,
    VERSION_FILE,
    BrokenGeneration,
    GenerationRecord,
    read_generation,
    read_json,
)

AVERAGES_FOLDER = "averages"
WINDOWS_FOLDER = "windows"  # the snapshots inside window averages

_NAME = re.compile(r"([0-9]{8,})-([0-9]{12,})")


def folder_name(seq: int, step: int) -> str:
    """The name of a generation's folder. Names sort as generations do."""
    return f"{seq:08d}-{step:012d}"


def seq_in(name: str) -> int | None:
    """The seq in a name that contains the name of a generation's folder; None if it contains none."""
    match = _NAME.search(name)
    return int(match[1]) if match else None


def step_in(name: str) -> int:
    """The step in the name of a generation's folder.

    Raises:
        ValueError: it is not such a name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a generation's folder")
    return int(match[2])


def is_folder_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def read_record(folder: Path) -> GenerationRecord:
    """Read `generation.json`.

    Raises:
        BrokenGeneration: it is missing or invalid, or belongs to another folder.
    """
    record = read_generation(_read(folder / GENERATION_FILE))
    if folder.name != folder_name(record.info.seq, record.run.step):
        raise BrokenGeneration(f"{GENERATION_FILE} is that of {folder_name(record.info.seq, record.run.step)}")
    return record


def open_generation(run: str, folder: Path) -> Generation:
    """Read a generation and its versions, to be listed under `run`, and check that it is whole.

    Its `generation.json` has another run if that was set aside.

    Raises:
        BrokenGeneration: it is not whole.
    """
    record = read_record(folder)
    check_sizes(folder, record.files.values())
    names = [average.name for average in record.run.averages if average.has_content]
    versions = tuple(_version(run, folder, record, name) for name in names)
    return Generation(run, record.info.seq, record.run.step, record.info.pinned, record.info.finished, folder, versions)


def check_sizes(folder: Path, files: Iterable[FileEntry]) -> None:
    """Check that the files are in `folder` with their sizes.

    Raises:
        BrokenGeneration: a file is missing or has another size.
    """
    for entry in files:
        file = folder / entry.name
        if not file.is_file():
            raise BrokenGeneration(f"{entry.name} is missing")
        if file.stat().st_size != entry.size:
            raise BrokenGeneration(f"{entry.name} has {file.stat().st_size} bytes instead of {entry.size}")


def entry_of(name: str, path: Path) -> FileEntry:
    """The entry, under `name`, of a file, which is read to compute its digest."""
    return FileEntry(name, path.stat().st_size, sha256(path))


def verify(folder: Path, record: GenerationRecord) -> None:
    """Read every file that the run is resumed from and compare its sha256; not those that a trainer gave.

    Generations share these, so that a damaged one would make all of them unusable.

    Raises:
        BrokenGeneration: a file differs; the text names it.
    """
    for path, entry in record.files.items():
        if _is_given(path):
            continue
        found = sha256(folder / path)
        if found != entry.sha256:
            raise BrokenGeneration(f"{path} has sha256 {found} instead of {entry.sha256}")


def read_manifest(folder: Path, record: GenerationRecord) -> Manifest:
    """The manifest of a generation.

    Raises:
        BrokenGeneration: it is missing or invalid, or has another digest than the record.
    """
    try:
        value = read_json(b'{"tensors":' + _read(folder / MANIFEST_FILE) + b"}")["tensors"]
        manifest = manifests.from_json(value)
    except (RemoteProtocolError, BrokenGeneration) as error:
        raise BrokenGeneration(f"{MANIFEST_FILE} is not a manifest: {error}") from None
    if manifest.digest != record.run.manifest_digest:
        raise BrokenGeneration(f"{MANIFEST_FILE} has digest {manifest.digest}, not {record.run.manifest_digest}")
    return manifest


def version_of(run: str, folder: Path, seq: int, data: bytes, own: FileEntry) -> Version:
    """The version that a `version.json` with this content describes; `own` is the entry of that file.

    Raises:
        BrokenGeneration: the content is invalid.
    """
    value: dict[str, Any] = read_json(data)
    try:
        files = (*(FileEntry(str(f["name"]), int(f["size"]), str(f["sha256"])) for f in value["files"]), own)
        return Version(
            id=str(value["id"]),
            run=run,
            average=str(value["average"]),
            spec=str(value["spec"]),
            step=int(value["step"]),
            updates=int(value["updates"]),
            gap_steps=int(value["gap_steps"]),
            created=str(value["created"]),
            files=files,
            folder=folder,
            seq=seq,
            derived=str(value["derived"]["kind"]) if "derived" in value else None,
            decay=value.get("decay"),
            half_life_steps=value.get("half_life_steps"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenGeneration(f"{VERSION_FILE} is not a version: {error!r}") from None


def _version(run: str, folder: Path, record: GenerationRecord, average: str) -> Version:
    path = f"{AVERAGES_FOLDER}/{average}/{VERSION_FILE}"
    entry = record.files.get(path)
    if entry is None:
        raise BrokenGeneration(f"{GENERATION_FILE} does not list {path}")
    own = FileEntry(VERSION_FILE, entry.size, entry.sha256)
    return version_of(run, (folder / path).parent, record.info.seq, _read(folder / path), own)


def _is_given(path: str) -> bool:
    """Whether a path in a generation is that of a companion file, or of a second name of a model file."""
    folder, _, rest = path.partition("/")
    name = rest.partition("/")[2]
    return folder == AVERAGES_FOLDER and (name not in OWN_FILES or name in SECOND_NAMES)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenGeneration(f"{path.name} is missing") from None
