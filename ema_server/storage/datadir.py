"""The data folder: its lock, its format, and the folders of its runs.

    LOCK  format.json  runs/{run}/generations/{seq}-{step}/
                       runs/{run}/derived/{seq}-{step}/     derived versions
                       runs/{run}/ring/{seq}-{step}/        power averages kept for synthesis
                       runs/{run}/files/{sha256}            companion files
                       runs/.deleted-{number}-{run}/        a deleted run, until it is erased

Unfinished writes are deleted when the folder is opened. A generation that is not whole is renamed to `.bad-...` for
inspection, and logged.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ema_proto.limits import NAME_CHARS_MAX
from ema_proto.names import is_name
from ema_server.storage.catalog import Generation
from ema_server.storage.disk import make_folder, probe_write, replace_durably, sync_folders
from ema_server.storage.generation import is_folder_name, open_generation, seq_in
from ema_server.storage.records import FORMAT, BrokenGeneration

_LOCK_FILE = "LOCK"
_FORMAT_FILE = "format.json"
TEMPORARY = ".tmp-"
_ROOM_BYTES = 256 << 10  # the size of an empty database
_BAD = ".bad-"
_DATED = re.compile(r".+\.[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")
_DELETED = re.compile(r"\.deleted-([0-9]+)-(.+)")

logger = logging.getLogger("ema")


class DataDirError(Exception):
    """The data folder cannot be used; the text says why and what to do."""


class DataDir:
    """An opened data folder, locked against a second server. Build with `open_data_dir`."""

    def __init__(self, root: Path, lock_fd: int, made: tuple[Path, ...]) -> None:
        self.root = root
        self._lock_fd = lock_fd
        self._made = made

    def close(self, *, unused: bool = False) -> None:
        """Unlock the folder. If it is `unused`, delete the folders that were made when it was opened."""
        if unused and self._made and not self.runs():
            self._remove()
        os.close(self._lock_fd)

    def runs(self) -> tuple[str, ...]:
        """Names of the runs that have a folder."""
        names = (path.name for path in self._runs.iterdir() if path.is_dir())
        return tuple(sorted(name for name in names if not _DELETED.fullmatch(name) and _is_run(name)))

    def like(self, run: str) -> str | None:
        """Another run whose name differs only in case."""
        lower = run.lower()
        return next((name for name in self.runs() if name.lower() == lower and name != run), None)

    def has_folder(self, run: str) -> bool:
        """Whether there is a folder of this run, with or without a generation that can be read."""
        return is_name("run", run) and self.run_folder(run).is_dir()

    def generations_folder(self, run: str) -> Path:
        """The generations of `run`; it may not exist."""
        return self._runs / run / "generations"

    def run_folder(self, run: str) -> Path:
        return self._runs / run

    def derived_folder(self, run: str) -> Path:
        """The derived versions of `run`; it may not exist."""
        return self._runs / run / "derived"

    def ring_folder(self, run: str) -> Path:
        """The ring of `run`; it may not exist."""
        return self._runs / run / "ring"

    def files_folder(self, run: str) -> Path:
        """The companion files of `run`; it may not exist."""
        return self._runs / run / "files"

    def create_run(self, run: str) -> None:
        """Create the folder of a run durably if it does not exist."""
        make_folder(self.run_folder(run))
        make_folder(self.generations_folder(run))

    def whole_generations(self, run: str) -> Iterator[Generation]:
        """The whole generations of a run. The others are renamed by `set_bad`."""
        folder = self.generations_folder(run)
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if not is_folder_name(path.name):
                continue
            try:
                yield open_generation(run, path)
            except BrokenGeneration as error:
                self.set_bad(path, error)

    def set_bad(self, folder: Path, error: BrokenGeneration) -> None:
        """Rename the folder of a broken generation or derived version."""
        logger.error("%s is broken and set aside: %s", folder, error)
        folder.rename(folder.with_name(_BAD + folder.name))

    def next_seq(self, run: str) -> int:
        """One above the highest seq of a generation, broken ones included; 1 if there is none."""
        return next_seq_in(self.generations_folder(run))

    def temporary(self, run: str, name: str) -> Path:
        """A path beside the generations of `run`, deleted at the next start if it is left over."""
        return self.generations_folder(run) / (TEMPORARY + name)

    def set_run_aside(self, run: str, stamp: str) -> str:
        """Rename a run to its own name and a date, `stamp`, in characters that a name may have; return the new name."""
        new = next(name for name in _dated_names(run, stamp) if not (self._runs / name).exists())
        (self._runs / run).rename(self._runs / new)
        sync_folders([self._runs])
        return new

    def set_deleted(self, run: str) -> Path | None:
        """Rename the folder of a run durably, so that it is no run any longer; None if there is no folder.

        Raises:
            OSError: the disk refuses; nothing has changed.
        """
        number = max((int(found[1]) for found in self._deleted()), default=0) + 1
        aside = self._runs / f".deleted-{number}-{run}"
        try:
            self.run_folder(run).rename(aside)
        except FileNotFoundError:
            return None
        sync_folders([self._runs])
        return aside

    def deleted(self) -> tuple[tuple[str, Path], ...]:
        """Runs that were deleted and are not erased yet: their names and their renamed folders."""
        return tuple((found[2], self._runs / found[0]) for found in self._deleted())

    def sweep(self) -> None:
        """Delete unfinished writes."""
        for run in self.runs():
            for path in self._runs.joinpath(run).glob(f"*/{TEMPORARY}*"):
                logger.info("deleting %s, left over from an earlier process", path)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _deleted(self) -> list[re.Match[str]]:
        return [found for path in self._runs.iterdir() if (found := _DELETED.fullmatch(path.name))]

    def _remove(self) -> None:
        """Delete the files that a server writes before the first run, and the folders made for them."""
        try:
            for path in self.root.iterdir():
                if path.is_file():
                    path.unlink()
            for folder in (self._runs, *self._made):
                folder.rmdir()
        except OSError as error:
            logger.debug("%s is not deleted: %s", self.root, error)

    @property
    def _runs(self) -> Path:
        return self.root / "runs"


def delete_whole(folder: Path) -> None:
    """Delete a folder of a run, so that a crash or power loss leaves all or nothing under its name.

    Raises:
        OSError: it cannot be renamed. Files that cannot be deleted after that are deleted at the next start.
    """
    aside = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    folder.rename(aside)
    sync_folders([folder.parent])  # or a power loss could leave the old name and not all files
    shutil.rmtree(aside, ignore_errors=True)


def is_dated(run: str) -> bool:
    """Whether the name is one that `set_run_aside` gives."""
    return _DATED.fullmatch(run) is not None


def next_seq_in(folder: Path) -> int:
    """One above the highest seq in the names in `folder`, which may not exist; 1 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((seq for name in names if (seq := seq_in(name)) is not None), default=0) + 1


def open_data_dir(root: Path) -> DataDir:
    """Create or open a data folder, lock it, check its format, and delete unfinished writes.

    Raises:
        DataDirError: it is in use, of a newer format, or cannot be written.
    """
    made = tuple(folder for folder in (root, *root.parents) if not folder.exists())
    try:
        (root / "runs").mkdir(parents=True, exist_ok=True)
        sync_folders([*(folder.parent for folder in made), root])
        data_dir = DataDir(root, _lock(root / _LOCK_FILE), made)
    except OSError as error:
        raise DataDirError(
            f"data folder {root} cannot be used: {error.strerror}; choose another with --data"
        ) from error
    try:
        _check_format(root / _FORMAT_FILE)
        data_dir.sweep()
        probe_write(root, _ROOM_BYTES)  # the metrics' database would fail next, with a less helpful message
    except OSError as error:
        data_dir.close(unused=True)
        raise DataDirError(
            f"data folder {root} cannot be used: {error.strerror}; make room, or choose another with --data"
        ) from error
    except DataDirError:
        data_dir.close()
        raise
    return data_dir


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DataDirError(
            f"data folder {path.parent} is in use by another server (process {owner}): stop it or choose another --data"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _check_format(path: Path) -> None:
    if not path.exists():
        replace_durably(path, json.dumps({"format": FORMAT}).encode() + b"\n")
        return
    try:
        found = json.loads(path.read_bytes())["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataDirError(f"{path} is invalid ({error!r}): restore it or choose another --data") from None
    if found != FORMAT:
        raise DataDirError(
            f"data folder {path.parent} has format {found!r}, this server reads {FORMAT}: "
            "use the server that wrote it or choose another --data"
        )


def _is_run(name: str) -> bool:
    if not is_name("run", name):
        logger.warning("ignoring runs/%s: it is not a valid run name", name)
        return False
    return True


def _dated_names(run: str, stamp: str) -> Iterator[str]:
    number = 1
    while True:
        suffix = f".{stamp}" if number == 1 else f".{stamp}-{number}"
        yield run[: NAME_CHARS_MAX - len(suffix)].rstrip(".-") + suffix
        number += 1
