"""Derived versions on disk: written once, durably, and kept until they are deleted.

    runs/{run}/derived/{seq}-{step}/    model.safetensors  config.json  version.json  companion files

Unfinished ones are deleted at the next start. Retention does not touch them. A run that is set aside takes them along.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ema_proto.names import check_name
from ema_server.storage.catalog import Catalog, FileEntry, Version, VersionGone
from ema_server.storage.companions import Sources, folders_in, place
from ema_server.storage.datadir import TEMPORARY, DataDir, delete_whole, next_seq_in
from ema_server.storage.disk import make_folder, sync_folders, write_durably
from ema_server.storage.generation import check_sizes, entry_of, folder_name, is_folder_name, seq_in, version_of
from ema_server.storage.records import CONFIG_FILE, VERSION_FILE, BrokenGeneration, identified, read_json, rfc3339
from ema_server.tensors.file_plan import MODEL_FILE

Piece: TypeAlias = bytes | bytearray | memoryview

_SUPERSEDED = ".superseded"

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class Derivation:
    """What a derived version is.

    Args:
        run: the run.
        average: the name under which it is listed, which no average of the run has.
        spec: its rule.
        step: the step of its weights.
        updates: as in the version that it was made from.
        gap_steps: likewise.
        kind: one word for how it was made.
        provenance: what it was made from, as JSON values; `derived` of `version.json`, with the kind.
    """

    run: str
    average: str
    spec: str
    step: int
    updates: int
    gap_steps: int
    kind: str
    provenance: Mapping[str, Any]


class DerivedStore:
    """The derived versions of every run. Safe from any thread.

    `wall` gives seconds since the epoch, for `created`. `on_change` is called with the run when files were written or
    deleted.
    """

    def __init__(
        self,
        data_dir: DataDir,
        catalog: Catalog,
        wall: Callable[[], float] = time.time,
        on_change: Callable[[str], None] = lambda run: None,
    ) -> None:
        self.catalog = catalog
        self._data_dir = data_dir
        self._wall = wall
        self._on_change = on_change
        self._naming = threading.Lock()

    def restore(self) -> None:
        """List what is on disk. Versions that are not whole are renamed to `.bad-...`.

        Raises:
            OSError: the data folder cannot be read.
        """
        for run in self._data_dir.runs():
            folder = self._data_dir.derived_folder(run)
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if is_folder_name(path.name):
                    self._restore(run, path)

    def write(
        self, what: Derivation, pieces: Iterable[Piece], config: bytes | None, companions: Sources | None = None
    ) -> Version:
        """Write and list a version. If a version with the same content exists, return that instead.

        Args:
            what: the version.
            pieces: the bytes of its model file.
            config: the content of its `config.json`, or None.
            companions: files that the trainer gave, which are linked.

        Raises:
            LocalProtocolError: the name of the average is not allowed.
            OSError: the disk fails; nothing is left. Exceptions of `pieces` propagate likewise.
            VersionGone: the run was set aside or deleted meanwhile.
        """
        check_name("average", what.average)
        parent = self._data_dir.derived_folder(what.run)
        try:
            make_folder(parent)  # in the run's own folder, which is gone if the run was deleted meanwhile
            folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        except FileNotFoundError:
            raise _gone(what) from None
        try:
            version = self._fill(folder, what, pieces, config, companions or {})
            known = next((old for old in self.catalog.derived(what.run) if old.id == version.id), None)
            return known if known is not None else self._show(folder, what)
        except FileNotFoundError:
            if folder.exists():
                raise
            raise _gone(what) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # renamed if all went well
            self._on_change(what.run)

    def provenance(self, version: Version) -> dict[str, Any]:
        """What a derived version was made from, with `kind`.

        Raises:
            BrokenGeneration: its `version.json` is invalid.
            OSError: the disk fails, or the version was deleted.
        """
        found = read_json((version.folder / VERSION_FILE).read_bytes()).get("derived")
        if not isinstance(found, dict):
            raise BrokenGeneration(f"{version.folder / VERSION_FILE} does not say what it was made from")
        return found

    def supersede(self, run: str, step: int) -> None:
        """The run was rewound to `step`: mark versions of later steps, which belong to the discarded history."""
        for version in self.catalog.derived(run):
            if version.step > step:
                try:
                    (version.folder / _SUPERSEDED).touch()
                    sync_folders([version.folder])
                except OSError as error:
                    logger.warning("%s could not be marked as superseded: %s", version.folder, error)

    def is_superseded(self, version: Version) -> bool:
        """Whether the run was rewound to before the version's step since it was made."""
        return (version.folder / _SUPERSEDED).exists()

    def delete(self, version: Version) -> bool:
        """Delete a derived version; False while a reader holds it, and for a minute after.

        Raises:
            OSError: the disk fails.
        """
        if not self.catalog.remove_derived(version):
            return False
        delete_whole(version.folder)
        self._on_change(version.run)
        return True

    def _restore(self, run: str, folder: Path) -> None:
        try:
            self.catalog.add_derived(open_derived(run, folder))
        except BrokenGeneration as error:
            self._data_dir.set_bad(folder, error)

    def _fill(
        self, folder: Path, what: Derivation, pieces: Iterable[Piece], config: bytes | None, companions: Sources
    ) -> Version:
        """Write the files into a temporary folder, and return the version as it is there."""
        folder.chmod(0o755)
        with (folder / MODEL_FILE).open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if config is not None:
            write_durably(folder / CONFIG_FILE, config)
        written = [entry_of(path.name, path) for path in folder.iterdir()]
        model = next(entry for entry in written if entry.name == MODEL_FILE)
        files = tuple(sorted((*written, *place(companions, folder, model)), key=lambda entry: entry.name))
        data = identified(_content(what, files), rfc3339(self._wall()))
        write_durably(folder / VERSION_FILE, data)
        sync_folders(folders_in(folder, files))
        return version_of(what.run, folder, 0, data, entry_of(VERSION_FILE, folder / VERSION_FILE))

    def _show(self, folder: Path, what: Derivation) -> Version:
        with self._naming:
            final = folder.with_name(folder_name(next_seq_in(folder.parent), what.step))
            folder.rename(final)
            sync_folders([final.parent])
            version = open_derived(what.run, final)
            self.catalog.add_derived(version)
            return version


def open_derived(run: str, folder: Path) -> Version:
    """Read a derived version, to be listed under `run`, and check that it is whole.

    Its `version.json` has another run if that was set aside.

    Raises:
        BrokenGeneration: it is not whole.
    """
    path = folder / VERSION_FILE
    if not path.is_file():
        raise BrokenGeneration(f"{VERSION_FILE} is missing")
    version = version_of(run, folder, seq_in(folder.name) or 0, path.read_bytes(), entry_of(VERSION_FILE, path))
    if version.derived is None or folder.name != folder_name(version.seq, version.step):
        raise BrokenGeneration(f"{VERSION_FILE} does not describe a derived version of step {version.step}")
    check_sizes(folder, version.files)
    return version


def _gone(what: Derivation) -> VersionGone:
    return VersionGone(f"run {what.run} was set aside or deleted while {what.average} was made: ask again")


def _content(what: Derivation, files: tuple[FileEntry, ...]) -> dict[str, Any]:
    return {
        "run": what.run,
        "average": what.average,
        "spec": what.spec,
        "step": what.step,
        "updates": what.updates,
        "gap_steps": what.gap_steps,
        "derived": {"kind": what.kind, **what.provenance},
        "files": [asdict(entry) for entry in files],
    }
