"""Generations and versions as values, and the catalog of those that exist.

The catalog is safe from any thread. It does not write or delete files, but decides which may be deleted: what a reader
holds, or held within the last minute, stays.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

HOLD_GRACE_S = 60.0  # a download in parts returns within seconds; a stuck one may start again

_ID = re.compile(r"[0-9a-f]{40}")
_STEP = re.compile(r"step-([0-9]{1,16})")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a version; `size` in bytes, `sha256` in 64 hex digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Version:
    """One average at one step, immutable. `id` is 40 hex digits of a digest of its content, `folder` holds `files`.

    `seq` is the number of its generation. A derived version has its kind in `derived` (`synthesized`, `recalibrated`),
    an average name of its own, and a `seq` that counts the run's derived versions. `decay` and `half_life_steps` are
    those of its rule at its step, None if it has none.
    """

    id: str
    run: str
    average: str
    spec: str
    step: int
    updates: int
    gap_steps: int
    created: str
    files: tuple[FileEntry, ...]
    folder: Path
    seq: int
    derived: str | None = None
    decay: float | None = None
    half_life_steps: float | None = None

    def file(self, name: str) -> FileEntry | None:
        """The entry of the file of this name, None if there is none."""
        return next((entry for entry in self.files if entry.name == name), None)


@dataclass(frozen=True, slots=True)
class Generation:
    """All averages of a run at one step, whole on disk. `seq` grows by one with each generation of the run."""

    run: str
    seq: int
    step: int
    pinned: bool
    finished: bool
    folder: Path
    versions: tuple[Version, ...]


def content_nbytes(files: Iterable[FileEntry]) -> int:
    """The bytes of files, those of files with the same content once: they are hard links."""
    return sum({file.sha256: file.size for file in files}.values())


class VersionGone(LookupError):
    """The version was removed after it was found."""


class Catalog:
    """The generations and derived versions of every run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._generations: dict[str, tuple[Generation, ...]] = {}  # newest (highest seq) first
        self._derived: dict[str, tuple[Version, ...]] = {}  # newest (highest seq) first
        self._holds: dict[Path, int] = {}
        self._released_at: dict[Path, float] = {}
        self._on_move: list[Callable[[str, str], None]] = []
        self._guards: list[Callable[[Version], bool]] = []

    def runs(self) -> tuple[str, ...]:
        """Names of the runs that have a generation, sorted."""
        with self._lock:
            return tuple(sorted(run for run, generations in self._generations.items() if generations))

    def generations(self, run: str) -> tuple[Generation, ...]:
        """Generations of `run`, newest (highest seq) first."""
        with self._lock:
            return self._generations.get(run, ())

    def averages(self, run: str) -> tuple[str, ...]:
        """Names of the averages in the newest generation, in the run's order."""
        generations = self.generations(run)
        return tuple(version.average for version in generations[0].versions) if generations else ()

    def derived(self, run: str) -> tuple[Version, ...]:
        """The derived versions of `run`, newest (highest seq) first."""
        with self._lock:
            return self._derived.get(run, ())

    def derived_averages(self, run: str) -> tuple[str, ...]:
        """Names of the averages that have derived versions, sorted."""
        return tuple(sorted({version.average for version in self.derived(run)}))

    def versions(self, run: str, average: str) -> tuple[Version, ...]:
        """Versions of one average, newest (highest seq) first, the same id once."""
        kept = (version for generation in self.generations(run) for version in generation.versions)
        found: dict[str, Version] = {}
        for version in (*kept, *self.derived(run)):
            if version.average == average:
                found.setdefault(version.id, version)
        return tuple(found.values())

    def find(self, run: str, average: str, rev: str) -> Version | None:
        """The version that `rev` names: 40 hex digits, `step-N` (the newest of that step) or `latest`."""
        versions = self.versions(run, average)
        if rev == "latest":
            return versions[0] if versions else None
        step = _STEP.fullmatch(rev)
        if step:
            return next((version for version in versions if version.step == int(step[1])), None)
        if _ID.fullmatch(rev):
            return next((version for version in versions if version.id == rev), None)
        return None

    @contextmanager
    def hold(self, version: Version) -> Iterator[Version]:
        """Keep the files of `version` on disk in the `with` block, and for a minute after it.

        Raises:
            VersionGone: it has been removed.
        """
        key = version.folder
        with self._lock:
            if not self._has(version):
                raise VersionGone(f"version {version.id} of {version.run}/{version.average} is gone: list again")
            self._holds[key] = self._holds.get(key, 0) + 1
        try:
            yield version
        finally:
            with self._lock:
                self._holds[key] -= 1
                if not self._holds[key]:
                    del self._holds[key]
                    self._released_at[key] = self._clock()

    def listen(self, *on_move: Callable[[str, str], None]) -> None:
        """Call each of these as `on_move(run, new_run)` whenever a run is renamed. They must not block."""
        self._on_move += on_move

    def guard(self, is_needed: Callable[[Version], bool]) -> None:
        """Keep versions while `is_needed(version)` is true. It must neither block nor call the catalog."""
        self._guards.append(is_needed)

    def add(self, generation: Generation) -> None:
        """Add a generation, or replace the one of its seq (publisher only)."""
        with self._lock:
            self._generations[generation.run] = _added(self._generations.get(generation.run, ()), generation)

    def add_derived(self, version: Version) -> None:
        """Add a derived version.

        Raises:
            VersionGone: its folder no longer exists, because the run was set aside or deleted.
        """
        with self._lock:
            if not version.folder.exists():
                raise VersionGone(
                    f"run {version.run} was set aside or deleted while {version.average} was made: ask again"
                )
            self._derived[version.run] = _added(self._derived.get(version.run, ()), version)

    def remove_derived(self, version: Version) -> bool:
        """Remove a derived version unless a reader holds it; returns whether its files may be deleted."""
        with self._lock:
            if self._is_held(version):
                return False
            known = self._derived.get(version.run, ())
            self._derived[version.run] = tuple(other for other in known if other != version)
            self._released_at.pop(version.folder, None)
            return True

    def remove(self, generation: Generation, *, force: bool = False) -> bool:
        """Remove a generation unless a reader holds one of its versions (publisher only).

        With `force` it is removed in any case: its files are broken. Returns whether they may be deleted.
        """
        with self._lock:
            if not force and any(self._is_held(version) for version in generation.versions):
                return False
            known = self._generations.get(generation.run, ())
            self._generations[generation.run] = tuple(other for other in known if other.seq != generation.seq)
            for version in generation.versions:
                self._released_at.pop(version.folder, None)
            return True

    def move(self, run: str, new_run: str, new_folder: Path) -> None:
        """Rename a run whose folder has been renamed to `new_folder` (averager only)."""
        paths = new_run, new_folder.with_name(run), new_folder
        with self._lock:
            self._generations[new_run] = tuple(
                replace(_moved(each, *paths), versions=tuple(_moved(version, *paths) for version in each.versions))
                for each in self._generations.pop(run, ())
            )
            self._derived[new_run] = tuple(_moved(version, *paths) for version in self._derived.pop(run, ()))
        for listener in self._on_move:
            listener(run, new_run)

    def delete(self, run: str) -> None:
        """Remove a run whose folder has been renamed, whatever readers hold (averager only)."""
        with self._lock:
            self._generations.pop(run, None)
            self._derived.pop(run, None)

    def is_read(self, run: str) -> bool:
        """Whether a reader holds a version of the run, or held one within the last minute."""
        with self._lock:
            versions = [version for each in self._generations.get(run, ()) for version in each.versions]
            return any(self._is_held(version) for version in (*versions, *self._derived.get(run, ())))

    def _has(self, version: Version) -> bool:
        return version in self._derived.get(version.run, ()) or any(
            version in generation.versions for generation in self._generations.get(version.run, ())
        )

    def _is_held(self, version: Version) -> bool:
        released_at = self._released_at.get(version.folder)
        recent = released_at is not None and self._clock() - released_at < HOLD_GRACE_S
        return recent or version.folder in self._holds or any(is_needed(version) for is_needed in self._guards)


Listed = TypeVar("Listed", bound=Generation | Version)


def _added(known: tuple[Listed, ...], new: Listed) -> tuple[Listed, ...]:
    """With `new` in place of the item of its seq, newest first."""
    others = tuple(item for item in known if item.seq != new.seq)
    return tuple(sorted((new, *others), key=lambda item: item.seq, reverse=True))


def _moved(item: Listed, run: str, old: Path, new: Path) -> Listed:
    return replace(item, run=run, folder=new / item.folder.relative_to(old))
