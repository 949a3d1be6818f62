"""From the names in a path to what they name, or to the problem that says which of them is wrong; links.

`rev` is 40 hex digits (the version's id, immutable), or an alias that is redirected to it: `step-N` or `latest`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from ema_server.http.conditional import parse_ranges
from ema_server.http.problems import Code, Problem
from ema_server.http.services import Services
from ema_server.runs.status_store import AverageStatus, RunStatus
from ema_server.storage.catalog import FileEntry, Version, VersionGone
from ema_server.storage.records import VERSION_FILE, BrokenGeneration

RETRY_AFTER_S = 5
_NAMES_SHOWN = 20
_ID = re.compile(r"[0-9a-f]{40}")


def run_status(services: Services, run: str) -> RunStatus:
    """The status of a run, or the problem that there is none."""
    status = services.statuses.get(run)
    if status is None:
        deleted_at = services.statuses.deleted_at(run)
        if deleted_at is not None:
            raise Problem(Code.RUN_NOT_FOUND, f"run {run!r} was deleted at {deleted_at}, with all its versions")
        if services.has_folder(run):
            detail = (
                f"run {run!r} has files on the server's disk, but no generation that can be read: a trainer that joins "
                f"it begins a new run, DELETE /v1/runs/{run} (ema delete {run}) deletes the files"
            )
            raise Problem(Code.RUN_UNREADABLE, detail)
        names = [status.run for status in services.statuses.all()]
        known = ", ".join(names[:_NAMES_SHOWN]) if names else "none yet"
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise Problem(Code.RUN_NOT_FOUND, f"run {run[:60]!r} does not exist; the runs are: {known}{more}")
    return status


def average_status(services: Services, run: str, average: str) -> AverageStatus:
    """The status of an average of a run, or the problem that there is none."""
    statuses = run_status(services, run).averages
    for status in statuses:
        if status.name == average:
            return status
    names = ", ".join(status.name for status in statuses)
    raise Problem(Code.AVERAGE_NOT_FOUND, f"run {run!r} has no average {average!r}; it has {names}")


def average_versions(services: Services, run: str, average: str) -> tuple[Version, ...]:
    """Versions of an average, newest first (none yet: empty), or the problem that run or average is unknown."""
    status = run_status(services, run)
    versions = services.catalog.versions(run, average)
    names = [*(item.name for item in status.averages), *services.catalog.derived_averages(run)]
    if not versions and average not in names:
        raise Problem(Code.AVERAGE_NOT_FOUND, f"run {run!r} has no average {average!r}; it has {', '.join(names)}")
    return versions


def find_version(services: Services, run: str, average: str, rev: str) -> Version:
    """The version that `rev` names, or the problem that there is none."""
    version = services.catalog.find(run, average, rev)
    if version is not None:
        return version
    if rev == "latest" and not average_versions(services, run, average):
        detail = f"average {average!r} of run {run!r} has no version yet: try again, or POST …/runs/{run}/versions"
        raise Problem(Code.NO_VERSION_YET, detail, headers={"Retry-After": str(RETRY_AFTER_S)})
    held = ", ".join(f"step-{item.step}" for item in average_versions(services, run, average)) or "none"
    detail = f"{run}/{average} has no version {rev[:60]!r}: it may have been pruned. Held: {held}"
    raise Problem(Code.VERSION_NOT_FOUND, detail)


def version_gone(services: Services, version: Version) -> Problem:
    """The problem that a version was deleted after it had been found: with its run, or by retention."""
    run_status(services, version.run)
    return Problem(Code.VERSION_NOT_FOUND, f"version {version.id} was pruned a moment ago; take a newer one")


def find_file(version: Version, name: str) -> FileEntry:
    """The file `name` of a version, or the problem that there is none."""
    entry = version.file(name)
    if entry is not None:
        return entry
    names = ", ".join(entry.name for entry in version.files)
    raise Problem(Code.FILE_NOT_FOUND, f"version {version.id} has no file {name[:100]!r}; it has {names}")


def path_of(version: Version) -> str:
    """The path of a version, immutable."""
    return f"/v1/runs/{version.run}/averages/{version.average}/versions/{version.id}"


def relative_link(request: Request, path: str) -> str:
    """`path` relative to that of the request, so that it holds behind a reverse proxy that adds a prefix."""
    return quote(posixpath.relpath(path, posixpath.dirname(request.scope["path"])))


def is_alias(rev: str) -> bool:
    """Whether `rev` may name another version later."""
    return _ID.fullmatch(rev) is None


@contextmanager
def reading(services: Services, version: Version) -> Iterator[None]:
    """Hold a version while its `version.json` is read; a problem if it is gone, or the content is not valid."""
    try:
        with services.catalog.hold(version):
            yield
    except VersionGone:
        raise version_gone(services, version) from None
    except OSError as error:
        detail = f"{VERSION_FILE} of version {version.id} could not be read: {error.strerror or error}"
        raise Problem(Code.DAMAGED, detail) from None
    except (BrokenGeneration, KeyError, TypeError, ValueError) as error:
        raise Problem(Code.DAMAGED, f"{VERSION_FILE} of version {version.id} has no valid ledger: {error!r}") from None


def redirect(request: Request, version: Version, path: str) -> Response:
    """Send the client from an alias to an immutable path of `version`."""
    query = f"?{request.url.query}" if request.url.query else ""
    location = relative_link(request, path) + query
    headers = {"Location": location, "Cache-Control": "no-cache", "X-EMA-Step": str(version.step)}
    return Response(status_code=307, headers=headers)


def refuse_resume(address: str, headers: Headers, *, parts: bool = False) -> None:
    """Refuse to continue a download through an alias, unless the request says of which file it has a part.

    All versions of an average have the same length: if the alias has moved in between, the client would join the
    parts of two of them, and most clients cannot notice. Only 409 makes curl, wget and aria2 all stop with an error
    and leave their partial file alone. With `If-Range` or `If-Match` the immutable address tells them apart.

    Args:
        address: that of the file in the version that the alias names now, for the message.
        headers: of the request.
        parts: allow ranges with an end, which clients that resume do not send.
    """
    ranges = parse_ranges(headers.get("range", "")) or ()
    resumes = any(first != 0 and not (parts and last is not None) for first, last in ranges)
    if not resumes or "if-range" in headers or "if-match" in headers:
        return
    detail = (
        f"the alias may have moved since the first part was downloaded: resume from the address of one version "
        f"({address} is the current one), or begin again"
    )
    raise Problem(Code.ALIAS_RANGE, detail)
