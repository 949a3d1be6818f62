"""The folder that `ema watch` keeps.

    step-300-0123456789ab/    a version, complete once it has `version.json`
    current                   a link to the newest one
    .watch.json               the version that every target has taken

The link and `.watch.json` are replaced by a rename: a process that is killed leaves the old one or the new one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ema_reader.errors import ReaderError, UsageError
from ema_reader.partial import exclusive
from ema_reader.values import Version

log = logging.getLogger(__name__)

LINK = "current"
_STATE = ".watch.json"
_LOCK = ".watch.lock"
_COMPLETE = "version.json"
_NAME = re.compile(r"step-[0-9]+-[0-9a-f]{12}")


class WatchedFolder:
    """A context manager that locks the folder against a second `ema watch`.

    Args:
        path: the folder; created if it is missing.
        run: the run.
        average: the average; a folder has versions of one average only.
        keep: how many versions stay, the newest included.

    Raises:
        UsageError: the folder has versions of another average.
        ReaderError: another process watches into it, or the disk refuses.
    """

    def __init__(self, path: Path, run: str, average: str, keep: int) -> None:
        self.path = path.absolute()
        self._owner = {"run": run, "average": average}
        self._keep = keep
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            refusal = f"another ema watch keeps {self.path}: choose another folder"
            self._stack.enter_context(exclusive(self.path / _LOCK, refusal))
        except OSError as error:
            raise ReaderError(f"cannot write {error.filename or self.path}: {error.strerror or error}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def link(self) -> Path:
        return self.path / LINK

    def folder_of(self, version: Version) -> Path:
        return self.path / f"step-{version.step}-{version.id[:12]}"

    def delivered(self) -> str | None:
        """The id of the version that is linked and that every target has taken; None if there is none.

        Raises:
            UsageError: it is one of another average.
        """
        try:
            state: dict[str, Any] = json.loads((self.path / _STATE).read_bytes())
            owner, version, folder = state["owner"], str(state["version"]), str(state["folder"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if owner != self._owner:
            names = "/".join(str(name) for name in owner.values())
            raise UsageError(f"{self.path} has versions of {names}: choose another folder")
        linked = self.link.is_symlink() and self.link.readlink() == Path(folder)
        return version if linked and (self.link / _COMPLETE).is_file() else None

    def point_to(self, folder: Path) -> None:
        """Have the link lead to a version's folder.

        Raises:
            ReaderError: the disk refuses, or has no links.
        """
        temporary = self.path / f".{LINK}.new"
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(folder.name, target_is_directory=True)
            temporary.replace(self.link)
        except OSError as error:
            raise ReaderError(f"cannot link {self.link} to {folder.name}: {error.strerror or error}") from error

    def record(self, version: Version) -> None:
        """Every target has taken the version. Older versions than those to keep are deleted, if the disk allows it.

        Raises:
            ReaderError: the disk refuses to record it.
        """
        state = {"owner": self._owner, "version": version.id, "folder": self.folder_of(version).name}
        temporary = self.path / f"{_STATE}.new"
        try:
            temporary.write_text(json.dumps(state))
            temporary.replace(self.path / _STATE)
            self._delete_old(self.folder_of(version))
        except OSError as error:
            raise ReaderError(f"cannot write {error.filename or self.path}: {error.strerror or error}") from error

    def _delete_old(self, newest: Path) -> None:
        """Delete incomplete versions, and complete ones beyond `keep`, those that came last staying."""
        others = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name) and path != newest]
        whole = [path for path in others if (path / _COMPLETE).is_file()]
        whole.sort(key=lambda path: (path / _COMPLETE).stat().st_mtime, reverse=True)
        kept = set(whole[: self._keep - 1])
        for path in others:
            if path not in kept:
                _delete(path)


def _delete(folder: Path) -> None:
    """Delete a version. An engine may still read it, which some file systems refuse: the next time tries again."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be deleted: %s", error.filename or folder, error.strerror or error)
