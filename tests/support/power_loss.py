"""What a POSIX file system may leave after a power loss at any moment of a recorded scenario.

While a scenario runs, every fsync is recorded with the content of the file or folder that it makes durable, and with
all that is on the disk then. After a power loss the names in a folder and the content of a file are there for certain
only if they were synced. Of the rest any part may be there: old or new names, and contents that are old, new, empty,
cut off or zero. A rename within a folder happens completely or not at all.

SQLite calls fsync by itself, which is not seen here: its files are left as they were on the disk at that moment.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

Mode: TypeAlias = Literal["synced", "all", "random"]
MODES: tuple[Mode, ...] = ("synced", "all", "random")
_OF_SQLITE = ".sqlite"


@dataclass(frozen=True, slots=True)
class _Disk:
    """Folders and files by number: the entries of each folder, the content of each file."""

    folders: Mapping[int, Mapping[str, int]]
    files: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment of a scenario.

    Attributes:
        reported: what was reported as durable before it.
    """

    reported: tuple[str, ...]
    _root: int
    _synced: _Disk
    _now: _Disk

    def leave(self, target: Path, mode: Mode, seed: int = 0) -> None:
        """Write into `target` what a power loss may leave: what was synced, and none, all or some of the rest."""
        self._write_folder(self._root, target, mode, random.Random(seed))

    def _write_folder(self, number: int, target: Path, mode: Mode, chance: random.Random) -> None:
        target.mkdir(exist_ok=True)
        for name, inside in sorted(self._entries(number, mode, chance).items()):
            if inside in self._now.folders or inside in self._synced.folders:
                self._write_folder(inside, target / name, mode, chance)
            else:
                (target / name).write_bytes(self._content(name, inside, mode, chance))

    def _entries(self, number: int, mode: Mode, chance: random.Random) -> Mapping[str, int]:
        synced, now = self._synced.folders.get(number, {}), self._now.folders.get(number, {})
        if mode == "synced":
            return dict(synced) | {name: inside for name, inside in now.items() if _OF_SQLITE in name}
        if mode == "all":
            return now
        moved = {inside: chance.random() < 0.5 for inside in {*synced.values(), *now.values()}}
        left = {name: inside for name, inside in synced.items() if now.get(name) == inside or not moved[inside]}
        return left | {name: inside for name, inside in now.items() if moved[inside] or _OF_SQLITE in name}

    def _content(self, name: str, number: int, mode: Mode, chance: random.Random) -> bytes:
        synced, now = self._synced.files.get(number), self._now.files.get(number)
        if _OF_SQLITE in name or now == synced:
            return now or b""
        if mode == "all" and now is not None:
            return now
        possible = [synced or b""]
        if mode == "random" and now is not None:
            possible += [now, now[: len(now) // 2], bytes(len(now))]
        return chance.choice(possible)


@dataclass(slots=True)
class Recorder:
    """Records what a scenario does below `root`, from any thread."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)  # of inodes, which are reused: a number is not
    _next: int = 0
    _folders: dict[int, Mapping[str, int]] = field(default_factory=dict)  # as last synced
    _files: dict[int, bytes] = field(default_factory=dict)
    _reported: list[str] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def report(self, text: str) -> None:
        """The scenario was told that this is durable."""
        with self._lock:
            self._note(self._read())
            self._reported.append(text)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the block. No fsync reaches the disk."""
        with self._lock:
            self._folders[self._number(self.root.stat().st_ino)] = {}
        names = ("unlink", "remove", "rmdir", "rename", "replace")
        patches = [mock.patch.object(os, name, self._forgetting(getattr(os, name))) for name in names]
        with mock.patch.object(os, "fsync", self._fsync):
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()
        with self._lock:
            self._note(self._read())

    def _fsync(self, fd: int) -> None:
        with self._lock:
            now = self._read()
            self._note(now)
            number = self._number(os.fstat(fd).st_ino)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                self._folders[number] = now.folders.get(number, {})
            else:
                self._files[number] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def _note(self, now: _Disk) -> None:
        root = self._number(self.root.stat().st_ino)
        self.moments.append(Moment(tuple(self._reported), root, _Disk(dict(self._folders), dict(self._files)), now))

    def _forgetting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A call that frees the inode of its last path."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                inode = _freed(args, kwargs)
                result = original(*args, **kwargs)
                if inode is not None:
                    self._numbers.pop(inode, None)
                return result

        return call

    def _number(self, inode: int) -> int:
        if inode not in self._numbers:
            self._numbers[inode] = self._next = self._next + 1
        return self._numbers[inode]

    def _read(self) -> _Disk:
        folders: dict[int, Mapping[str, int]] = {}
        files: dict[int, bytes] = {}
        for path, names, plain in os.walk(self.root):
            inside = {name: self._number(os.lstat(Path(path, name)).st_ino) for name in (*names, *plain)}
            folders[self._number(Path(path).stat().st_ino)] = inside
            files |= {inside[name]: Path(path, name).read_bytes() for name in plain}
        return _Disk(folders, files)


def _freed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The inode that is freed when the last path of a call loses its name."""
    folder = kwargs.get("dst_dir_fd" if len(args) > 1 else "dir_fd")
    try:
        found = os.lstat(args[-1], dir_fd=folder)
    except FileNotFoundError:
        return None
    return found.st_ino if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode) else None
