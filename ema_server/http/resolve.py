"""From the names in a path to what they name, or to the problem that says which of them is wrong; conditional requests.

`rev` is 40 hex digits (the version's id, immutable), or an alias that is redirected to it: `step-N` or `latest`.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.responses import Response

from ema_server.http.problems import Code, Problem
from ema_server.http.schemas import VersionOut
from ema_server.http.services import Services
from ema_server.runs.status_store import AverageStatus, RunStatus
from ema_server.storage.catalog import FileEntry, Version

RETRY_AFTER_S = 5
YEAR_S = 31_536_000
_NAMES_SHOWN = 20
_ID = re.compile(r"[0-9a-f]{40}")
_FROM_THE_START = re.compile(r"\s*bytes\s*=\s*0+\s*-[^,]*", re.IGNORECASE)


def run_status(services: Services, run: str) -> RunStatus:
    """The status of a run, or the problem that there is none."""
    status = services.statuses.get(run)
    if status is None:
        names = [status.run for status in services.statuses.all()]
        known = ", ".join(names[:_NAMES_SHOWN]) if names else "there is none yet"
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise Problem(Code.RUN_NOT_FOUND, f"run {run[:60]!r} is not among the runs here: {known}{more}")
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
        detail = (
            f"average {average!r} of run {run!r} has not been published yet: try again, or POST /v1/runs/{run}/versions"
        )
        raise Problem(Code.NO_VERSION_YET, detail, headers={"Retry-After": str(RETRY_AFTER_S)})
    held = ", ".join(f"step-{item.step}" for item in average_versions(services, run, average)) or "none"
    detail = f"{run}/{average} has no version {rev[:60]!r}: it may have been pruned. Held: {held}"
    raise Problem(Code.VERSION_NOT_FOUND, detail)


def find_file(version: Version, name: str) -> FileEntry:
    """The file `name` of a version, or the problem that there is none."""
    entry = version.file(name)
    if entry is not None:
        return entry
    names = ", ".join(entry.name for entry in version.files)
    raise Problem(Code.FILE_NOT_FOUND, f"version {version.id} has no file {name[:100]!r}; it has {names}")


def address_of(version: Version | VersionOut) -> str:
    """The path of a version, immutable."""
    return f"/v1/runs/{version.run}/averages/{version.average}/versions/{version.id}"


def is_alias(rev: str) -> bool:
    """Whether `rev` may name another version tomorrow."""
    return _ID.fullmatch(rev) is None


def redirect(version: Version, location: str) -> Response:
    """Send the client from an alias to the immutable address, given relative to the alias."""
    headers = {"Location": location, "Cache-Control": "no-cache", "X-EMA-Step": str(version.step)}
    return Response(status_code=307, headers=headers)


def refuse_resume(version: Version, entry: FileEntry, headers: Headers) -> None:
    """Refuse to continue a download through an alias.

    All versions of an average have the same length: if the alias has moved in between, the client would join the
    parts of two of them, and most clients cannot notice. Only 409 makes curl, wget and aria2 all stop with an error
    and leave their partial file alone. An `If-Range` with the digest of the current file proves that it is the same.
    """
    wanted = headers.get("range")
    if wanted is None or _FROM_THE_START.fullmatch(wanted) or headers.get("if-range") == f'"{entry.sha256}"':
        return
    address = f"{address_of(version)}/files/{entry.name}"
    detail = f"the alias may have moved since the first part was downloaded; the current version is at {address}"
    raise Problem(Code.ALIAS_RANGE, detail)


def is_current(headers: Headers, etag: str) -> bool:
    """Whether the client already has the representation with this strong `etag` (`If-None-Match`, weak comparison)."""
    wanted = ",".join(headers.getlist("if-none-match"))
    tags = {tag.strip().removeprefix("W/") for tag in wanted.split(",")}
    return "*" in tags or etag in tags


def immutable_headers(services: Services, etag: str) -> dict[str, str]:
    """`ETag` and `Cache-Control` of an immutable representation; shared caches must not keep what needs a token."""
    scope = "public" if services.token is None else "private"
    return {"ETag": etag, "Cache-Control": f"{scope}, max-age={YEAR_S}, immutable"}
