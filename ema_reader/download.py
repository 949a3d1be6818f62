"""Downloads a version into a folder: resumed, verified, and put in place whole or not at all.

What several files of a version have in common is downloaded once. Each file grows as `.{name}.{digest}.partial` beside
its final name. The digest in that name makes it safe to resume in another process: the bytes of two versions never meet
in one partial file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ema_reader.errors import NotFound, ReaderError, Unreachable
from ema_reader.partial import Partial, Progress, sha256_of
from ema_reader.transport import Transport, path_of
from ema_reader.values import File, Version, files_of

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

ATTEMPTS = 5  # in a row without one new byte
_PAUSE_S = 0.5
_LAST = "version.json"  # put in place after all others: a folder that has it is complete


def download_version(transport: Transport, version: Version, folder: Path, progress: Progress) -> Path:
    """Download all files of `version` into `folder` and return it; other files that are there already are kept.

    Those that an earlier download of another version has put there, and that `version` lacks, are removed: a tokenizer
    or `config.json` of another model would be loaded with these weights.

    Raises:
        VerificationFailed: a file does not have its sha256; nothing was put in place.
        NotFound: the server does not have the version; partial files, and a folder created for it, are removed.
        ReaderError: the server does not answer, the disk refuses, or another download writes there.
    """
    inner = {(folder / item.name).parent for item in version.files} - {folder}
    created = [path for path in (*inner, folder, *folder.parents) if not path.exists()]
    distinct: dict[str, File] = {}  # by content
    for item in version.files:
        distinct.setdefault(item.sha256, item)
    try:
        for path in (folder, *inner):
            path.mkdir(parents=True, exist_ok=True)
        ready = [(_fetch(transport, version, item, folder, progress), folder / item.name) for item in distinct.values()]
        copies = [(folder / distinct[item.sha256].name, folder / item.name) for item in version.files]
        _put_in_place(
            [(source, final) for source, final in ready if source != final],
            [(source, final) for source, final in copies if source != final],
            folder,
            _only_in_the_version_there(folder, version),
        )
    except NotFound as error:
        for item in version.files:
            _partial_path(folder, item).unlink(missing_ok=True)  # they can never be completed
        with contextlib.suppress(OSError):  # another process may use them by now
            for path in created:
                path.rmdir()
        raise NotFound(f"{version} is no longer on the server: it was deleted or pruned ({error})") from error
    except OSError as error:
        raise ReaderError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    return folder


def _fetch(transport: Transport, version: Version, item: File, folder: Path, progress: Progress) -> Path:
    """The path of a verified copy of `item`: the final file if it is right, else a complete partial file."""
    final = folder / item.name
    if final.is_file() and final.stat().st_size == item.size and sha256_of(final) == item.sha256:
        progress.start(item.name, item.size, item.size)
        return final
    path = path_of("runs", version.run, "averages", version.average, "versions", version.id, "files")
    path = "/".join((path, *map(quote, item.name.split("/"))))
    partial_path = _partial_path(folder, item)
    with Partial(partial_path, item, progress) as partial:
        _complete(transport, path, item, partial)
        partial.verify()
    return partial_path


def _complete(transport: Transport, path: str, item: File, partial: Partial) -> None:
    """Append until the file has its size, over as many connections as needed."""
    failures = 0
    while not partial.complete:
        before = partial.size
        try:
            _append(transport, path, item, partial)
        except Unreachable:
            failures = 0 if partial.size > before else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(_PAUSE_S * failures)


def _append(transport: Transport, path: str, item: File, partial: Partial) -> None:
    headers = {"Accept-Encoding": "identity"}
    if partial.size:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": f'"{item.sha256}"'}
    with transport.stream(path, headers) as response:
        if partial.size and not response.headers.get("content-range", "").startswith(f"bytes {partial.size}-"):
            partial.restart()  # the server sends the whole file
        for piece in response.iter_raw():  # as they arrive: cutting them to one size would halve the rate
            partial.append(piece)
    if partial.size != item.size:
        raise Unreachable(f"{transport.url} sent {partial.size} of {item.size} bytes of {item.name}")


def _only_in_the_version_there(folder: Path, version: Version) -> list[Path]:
    """The files in `folder` of another version, by its `version.json`, that are unchanged and that `version` lacks."""
    try:
        earlier = files_of(json.loads((folder / _LAST).read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    names = {item.name for item in version.files}
    found = [(folder / item.name, item.sha256) for item in earlier if item.name not in names]
    return [path for path, sha256 in found if path.is_file() and sha256_of(path) == sha256]


def _put_in_place(
    moves: list[tuple[Path, Path]], copies: list[tuple[Path, Path]], folder: Path, stale: list[Path]
) -> None:
    """Rename the complete files, and link the copies. The old `version.json` is removed first, the new one comes last.

    Args:
        moves: pairs of a file and the name that it gets.
        copies: the same.
        folder: of the version.
        stale: files to remove.
    """
    last = folder / _LAST
    if any(final == last for _, final in moves):
        last.unlink(missing_ok=True)
    for path in stale:
        path.unlink(missing_ok=True)
    for source, final in moves:
        if final != last:
            source.replace(final)
    for source, final in copies:
        _link(source, final)
    for source, final in moves:
        if final == last:
            source.replace(final)


def _link(source: Path, final: Path) -> None:
    """Give a file another name, by a hard link if the file system has them."""
    if final.exists() and final.samefile(source):
        return
    temporary = final.with_name(f".{final.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(final)


def _partial_path(folder: Path, item: File) -> Path:
    path = folder / item.name
    return path.with_name(f".{path.name}.{item.sha256[:16]}.partial")


class Silent:
    """Progress that is not shown."""

    def start(self, name: str, size: int, done: int) -> None:
        """Ignore it."""

    def advance(self, count: int) -> None:
        """Ignore it."""


@contextlib.contextmanager
def default_progress() -> Iterator[Progress]:
    """A bar for each file when stderr is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._name = ""

    def start(self, name: str, size: int, done: int) -> None:
        if self._task is None or name != self._name:
            self._name, self._task = name, self._bars.add_task(name, total=size)
        self._bars.update(self._task, completed=done)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=count)
