"""Companion files: what a trainer wants to have beside the weights in every version (tokenizer, model card, ...).

    runs/{run}/files/{sha256}    the content of the files of the run

Versions have hard links to these, so they take no more of the disk, and keep their files when the run gets others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from ema_proto.names import OWN_FILES
from ema_server.storage.catalog import FileEntry, Version
from ema_server.storage.datadir import TEMPORARY, DataDir
from ema_server.storage.disk import link_or_copy, make_folder, sha256, shortage, sync_folders
from ema_server.storage.records import ADAPTER_CONFIG, ADAPTER_FILE, CONFIG_FILE, DIFFUSERS_FILE, DIFFUSERS_KEY

Sources: TypeAlias = Mapping[FileEntry, Path]
"""Companion files, each with where its bytes are."""

logger = logging.getLogger("ema")


class DamagedFile(Exception):
    """A companion file arrived with another sha256 or size than announced."""


class CompanionStore:
    """The companion files of every run, by content. Safe from any thread.

    The averager says which files a run uses; the publisher deletes the others.
    """

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._lock = threading.Lock()
        self._claims: dict[str, frozenset[str]] = {}

    def claim(self, run: str, files: Sequence[FileEntry], *, also: Iterable[FileEntry] = ()) -> tuple[str, ...]:
        """Keep these files, and `also` those that the run has; returns the sha256 of those that are missing."""
        with self._lock:
            self._claims[run] = frozenset(file.sha256 for file in (*files, *also))
            missing = (file.sha256 for file in files if not _has(self._path(run, file), file))
            return tuple(dict.fromkeys(missing))

    def shortage(self, run: str, files: Iterable[FileEntry]) -> str | None:
        """Why the disk has no room for those of the files that are missing; None if it has.

        Raises:
            OSError: the disk fails.
        """
        needed = {file.sha256: file.size for file in files if not _has(self._path(run, file), file)}
        return shortage(self._data_dir.root, sum(needed.values())) if needed else None

    def sources(self, run: str, files: Iterable[FileEntry]) -> Sources:
        return {file: self._path(run, file) for file in files}

    def trim(self, run: str, published: Iterable[FileEntry]) -> None:
        """Delete what was neither `published` now nor is claimed (publisher only). Versions keep their links."""
        with self._lock:
            kept = self._claims.get(run, frozenset()) | {file.sha256 for file in published}
            folder = self._folder(run)
            try:
                paths = list(folder.iterdir()) if folder.is_dir() else []
                for path in (path for path in paths if path.name not in kept and not path.name.startswith(TEMPORARY)):
                    path.unlink()
            except OSError as error:
                logger.warning("run %s: files that it no longer uses could not be deleted: %s", run, error)

    def adopt(self, run: str, version: Version) -> tuple[FileEntry, ...]:
        """The companion files of a version, from now on in the store. Damaged ones are left out: they are sent again.

        Raises:
            OSError: the disk fails.
        """
        whole = []
        for file in companions_of(version.files):
            if sha256(version.folder / file.name) != file.sha256:
                logger.error("run %s: file %s is damaged; new versions are without it", run, file.name)
                self._path(run, file).unlink(missing_ok=True)
                continue
            whole.append(file)
            if not _has(self._path(run, file), file):
                make_folder(self._folder(run))  # in the run's own folder, which is gone if the run was deleted
                self._path(run, file).unlink(missing_ok=True)
                link_or_copy(version.folder / file.name, self._path(run, file))
        return tuple(whole)

    def receive(self, run: str, file: FileEntry) -> Draft:
        """Begin to write a file that arrives.

        Raises:
            OSError: the disk refuses, or the run was deleted.
        """
        make_folder(self._folder(run))  # in the run's own folder, which is gone if the run was deleted
        return Draft(self._path(run, file), file)

    def _folder(self, run: str) -> Path:
        return self._data_dir.files_folder(run)

    def _path(self, run: str, file: FileEntry) -> Path:
        return self._folder(run) / file.sha256


class Draft:
    """A companion file that arrives, in order. It gets its name once it is whole and durable.

    Args:
        path: the name.
        file: size and sha256 that it must have.
    """

    def __init__(self, path: Path, file: FileEntry) -> None:
        self._path = path
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        fd, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        self._temporary = Path(temporary)
        self._output = os.fdopen(fd, "wb", buffering=0)

    def write(self, payload: bytes) -> bool:
        """Append; with the last byte, give the file its name. Returns whether it is whole.

        Raises:
            DamagedFile: it is not what was announced.
            OSError: the disk refuses.
        """
        rest = memoryview(payload)
        while rest:
            rest = rest[self._output.write(rest) :]
        self._digest.update(payload)
        self._size += len(payload)
        if self._size < self._file.size:
            return False
        if (self._size, self._digest.hexdigest()) != (self._file.size, self._file.sha256):
            raise DamagedFile(f"file {self._file.name!r} arrived damaged: its sha256 is {self._digest.hexdigest()}")
        os.fchmod(self._output.fileno(), 0o644)
        os.fsync(self._output.fileno())
        self._output.close()
        self._temporary.rename(self._path)
        sync_folders([self._path.parent])
        return True

    def discard(self) -> None:
        """Delete what was written. What the disk does not delete is swept at the next start."""
        try:
            self._output.close()
            self._temporary.unlink()
        except OSError as error:
            logger.debug("%s is not deleted: %s", self._temporary, error)


def companions_of(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Those of a version's files that a trainer gave, `config.json` apart."""
    return tuple(file for file in files if file.name not in OWN_FILES)


def sources_in(version: Version) -> Sources:
    """The companion files of a version."""
    return {file: version.folder / file.name for file in companions_of(version.files)}


def place(companions: Sources, folder: Path, model: FileEntry) -> tuple[FileEntry, ...]:
    """Link companion files into the folder of a version; returns the entries of the files that it has now besides.

    The model file `model` is also linked under the name that PEFT or diffusers looks for, if it is a model of theirs.
    That shows in `adapter_config.json` among the files, or in the folder's `config.json`.

    Raises:
        OSError: the disk refuses.
    """
    for file, source in companions.items():
        target = folder / file.name
        target.parent.mkdir(exist_ok=True)
        link_or_copy(source, target)
    if any(file.name == ADAPTER_CONFIG for file in companions):
        second = ADAPTER_FILE
    elif _is_of_diffusers(folder / CONFIG_FILE):
        second = DIFFUSERS_FILE
    else:
        return tuple(companions)
    link_or_copy(folder / model.name, folder / second)
    return (*companions, replace(model, name=second))


def folders_in(folder: Path, files: Iterable[FileEntry]) -> list[Path]:
    """The folders, innermost first, that hold the files of a version in `folder`."""
    inner = {(folder / file.name).parent for file in files}
    return [*sorted(inner - {folder}), folder]


def _is_of_diffusers(config: Path) -> bool:
    try:
        return DIFFUSERS_KEY in json.loads(config.read_bytes())
    except FileNotFoundError:
        return False


def _has(path: Path, file: FileEntry) -> bool:
    try:
        return path.stat().st_size == file.size
    except OSError:
        return False
