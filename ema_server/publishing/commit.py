"""Makes a generation durable: files that a `GenerationWriter` wrote, or those of an older generation, get their name.

The order makes it crash-safe: files, `version.json`, `generation.json`, the folders, then the rename and its parent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ema_proto.wire.manifest import Manifest
from ema_server.publishing.writer import GenerationWriter
from ema_server.storage.catalog import Generation, Version
from ema_server.storage.companions import Sources, place
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
    GenerationInfo,
    GenerationRecord,
    RunRecord,
    generation_bytes,
    manifest_bytes,
    version_bytes,
)
from ema_server.tensors.file_plan import MODEL_FILE


@dataclass(frozen=True, slots=True)
class Content:
    """What a new generation holds besides the bytes of the averages.

    `config` is the text of `config.json`, `companions` the files that the trainer gave.
    """

    record: RunRecord
    manifest: Manifest
    config: str | None
    companions: Sources = field(default_factory=dict)


def commit(draft: GenerationWriter, content: Content, info: GenerationInfo) -> Generation:
    """Complete a draft and give it its final name.

    Raises:
        OSError: the disk refuses, now or at an earlier write of the draft. The caller deletes the draft's folder.
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
        version = _write_version(folder / AVERAGES_FOLDER / average.name, content, average, info)
        files |= {(path := f"{AVERAGES_FOLDER}/{average.name}/{f.name}"): replace(f, name=path) for f in version.files}
    return _rename(record.run, folder, GenerationRecord(info, record, files))


def commit_links(
    source: Generation, folder: Path, record: RunRecord, info: GenerationInfo, *, verified: bool
) -> Generation:
    """Make a new generation of hard links to the files of an older one.

    Args:
        source: the older generation.
        folder: temporary folder to build the new one in; must not exist.
        record: the run as the new one records it. Files of averages that it leaves out are left out.
        info: the new one's.
        verified: this process has written or checked the source's bytes; otherwise they are checked, all of them.

    Raises:
        BrokenGeneration: a file of the source is not what it should be.
        OSError: the disk refuses. The caller deletes the folder.
    """
    old = read_record(source.folder)
    if not verified:
        verify(source.folder, old)
    folder.mkdir()
    files = {path: entry for path, entry in old.files.items() if _belongs(path, record)}
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source.folder / path, folder / path)
    return _rename(source.run, folder, GenerationRecord(info, record, files))


def _write_version(folder: Path, content: Content, average: AverageRecord, info: GenerationInfo) -> Version:
    if content.config is not None:
        write_durably(folder / CONFIG_FILE, content.config.encode())
    written = [entry_of(path.name, path) for path in folder.iterdir()]
    model = next(entry for entry in written if entry.name == MODEL_FILE)
    files = tuple(sorted((*written, *place(content.companions, folder, model)), key=lambda entry: entry.name))
    data = version_bytes(content.record, average, info.created, files)
    write_durably(folder / VERSION_FILE, data)
    own = entry_of(VERSION_FILE, folder / VERSION_FILE)
    return version_of(content.record.run, folder, info.seq, data, own)


def _rename(run: str, folder: Path, record: GenerationRecord) -> Generation:
    write_durably(folder / GENERATION_FILE, generation_bytes(record))
    inner = {(folder / path).parent for path in record.files} - {folder}
    sync_folders([*sorted(inner), *sorted({path.parent for path in inner}), folder])
    final = folder.with_name(folder_name(record.info.seq, record.run.step))
    folder.rename(final)
    sync_folders([final.parent])
    return open_generation(run, final)


def _belongs(path: str, record: RunRecord) -> bool:
    """Whether a file of a generation, `manifest.json` or `averages/NAME/...`, is part of the run as recorded."""
    parts = path.split("/")
    return len(parts) == 1 or parts[1] in {average.name for average in record.averages if average.has_content}
