"""Turns files that were written, or those of an older generation, into a durable generation.

Takes a `GenerationWriter` or a `Generation` and what to record; returns a `Generation` under its final name. The order
makes it crash-safe: files, `version.json`, `generation.json`, the folders, then the rename and its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ema_proto.wire.manifest import Manifest
from ema_server.publishing.writer import GenerationWriter
from ema_server.storage.catalog import Generation, Version
from ema_server.storage.disk import link_or_copy, sync_folders, write_durably
from ema_server.storage.generation import (
    AVERAGES_FOLDER,
    WINDOWS_FOLDER,
    entry_of,
    folder_name,
    open_generation,
    read_record,
    verify,
    version_of,
)
from ema_server.storage.records import (
    CONFIG_FILE,
    GENERATION_FILE,
    MANIFEST_FILE,
    VERSION_FILE,
    AverageRecord,
    GenerationRecord,
    RunRecord,
    generation_bytes,
    manifest_bytes,
    version_bytes,
)


@dataclass(frozen=True, slots=True)
class Label:
    """What is said about a generation besides its content. `created` in RFC 3339."""

    seq: int
    reason: str
    pinned: bool
    finished: bool
    created: str


@dataclass(frozen=True, slots=True)
class Content:
    """What a new generation holds besides the averages' bytes; `config` is the text of `config.json`."""

    record: RunRecord
    manifest: Manifest
    config: str | None


def seal(draft: GenerationWriter, content: Content, label: Label) -> Generation:
    """Complete a draft and give it its name.

    Raises:
        OSError: the disk refuses, now or at an earlier write of the draft. The draft's folder is left to the caller.
    """
    draft.complete()
    draft.close()
    folder, record = draft.folder, content.record
    write_durably(folder / MANIFEST_FILE, manifest_bytes(content.manifest))
    files = {MANIFEST_FILE: entry_of(MANIFEST_FILE, folder / MANIFEST_FILE)}
    for average in record.averages:
        if not average.has_content:
            continue
        windows = folder / WINDOWS_FOLDER / average.name
        inside = sorted(windows.iterdir()) if average.window else []
        files |= {(path := f"{WINDOWS_FOLDER}/{average.name}/{f.name}"): entry_of(path, f) for f in inside}
        version = _seal_average(folder / AVERAGES_FOLDER / average.name, content, average, label)
        files |= {(path := f"{AVERAGES_FOLDER}/{average.name}/{f.name}"): replace(f, name=path) for f in version.files}
    final = GenerationRecord(label.seq, label.created, label.reason, label.pinned, label.finished, record, files)
    return _publish(record.run, folder, final)


def link(
    source: Generation, folder: Path, label: Label, amend: Callable[[RunRecord], RunRecord], *, trusts: bool
) -> Generation:
    """Make a new generation of the files of an older one.

    Args:
        source: the older generation.
        folder: temporary folder to build it in; must not exist.
        label: what is new about it.
        amend: makes the new record of the old one; the files of averages that it leaves out are left out.
        trusts: this process has written or read the source's bytes itself; otherwise they are checked, all of them.

    Raises:
        BrokenGeneration: a file of the source is not what it should be.
        OSError: the disk refuses. The folder is left to the caller.
    """
    old = read_record(source.folder)
    if not trusts:
        verify(source.folder, old)
    folder.mkdir()
    record = amend(old.run)
    files = {path: entry for path, entry in old.files.items() if _belongs(path, record)}
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source.folder / path, folder / path)
    new = GenerationRecord(label.seq, label.created, label.reason, label.pinned, label.finished, record, files)
    return _publish(source.run, folder, new)


def _seal_average(folder: Path, content: Content, average: AverageRecord, label: Label) -> Version:
    if content.config is not None:
        write_durably(folder / CONFIG_FILE, content.config.encode())
    files = tuple(entry_of(path.name, path) for path in sorted(folder.iterdir()))
    data = version_bytes(content.record, average, label.created, files)
    write_durably(folder / VERSION_FILE, data)
    own = entry_of(VERSION_FILE, folder / VERSION_FILE)
    return version_of(content.record.run, folder, label.seq, data, own)


def _publish(run: str, folder: Path, record: GenerationRecord) -> Generation:
    write_durably(folder / GENERATION_FILE, generation_bytes(record))
    inner = {(folder / path).parent for path in record.files} - {folder}
    sync_folders([*sorted(inner), *sorted({path.parent for path in inner}), folder])
    final = folder.with_name(folder_name(record.seq, record.run.step))
    folder.rename(final)
    sync_folders([final.parent])
    return open_generation(run, final)


def _belongs(path: str, record: RunRecord) -> bool:
    """Whether a file of a generation, `manifest.json` or `averages/NAME/...`, is part of the run as recorded."""
    parts = path.split("/")
    return len(parts) == 1 or parts[1] in {average.name for average in record.averages if average.has_content}
