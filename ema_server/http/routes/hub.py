"""The read routes of the Hugging Face Hub: `HF_ENDPOINT=http://SERVER` makes its clients load averages from here.

The repository `RUN/AVERAGE` has one commit for each version, with the version's id. The branch `main` is the newest
version; each step has a tag `step-N`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from typing import Annotated, Any
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ema_server.evaluation.metric_store import MetricStoreError
from ema_server.http.conditional import immutable_headers, is_unmodified, parse_ranges, satisfiable
from ema_server.http.download import Download
from ema_server.http.hub import commit
from ema_server.http.hub.card import README, TAGS, Card, model_index, read_card
from ema_server.http.hub.schemas import HubEntryOut, HubListedOut, HubModelOut, HubRefsOut
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import average_versions, find_file, find_version, is_alias, reading, refuse_resume
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.catalog import FileEntry, Version, content_nbytes

_API = "/api/models/{run}/{average}"
_FILE = "/{run}/{average}/resolve/{rev}/{path:path}"
_RAW = "/{run}/{average}/raw/{rev}/{path:path}"  # the same; the client in JavaScript looks here whether a file exists
_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~.-]+)+/?")  # never `//HOST`, which would be another server
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_MARKDOWN = "text/markdown"
_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file", **_BYTES},
    206: {"description": "The ranges asked for", **_BYTES},
    304: {"description": "Not modified"},
    307: {"description": "`rev` is a branch or tag: see Location"},
    409: {"model": ProblemOut, "description": "`rev` is a branch or tag, and a download through it cannot be resumed"},
    412: {"model": ProblemOut, "description": "If-Match or If-Unmodified-Since is of another file"},
    416: {"model": ProblemOut, "description": "No range lies in the file: see Content-Range"},
}
_PATHS = {
    "type": "object",
    "required": ["paths"],
    "properties": {"paths": {"type": "array", "items": {"type": "string"}}, "expand": {"type": "boolean"}},
}
_PATHS_BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": _PATHS} for kind in ("application/x-www-form-urlencoded", "application/json")},
    }
}

log = logging.getLogger(__name__)
router = APIRouter(tags=["hub"])


@router.get("/api/models", operation_id="hub_list_models")
async def list_models(
    services: ServicesDep,
    author: str | None = None,
    search: str = "",
    limit: Annotated[int | None, Query(ge=1)] = None,
) -> tuple[HubListedOut, ...]:
    """The averages that have a version, the newest one first: of the run `author`, and with `search` in their name."""
    newest = [
        versions[0]
        for status in services.statuses.all()
        if author in (None, status.run)
        for average in (*(each.name for each in status.averages), *services.catalog.derived_averages(status.run))
        if search.lower() in f"{status.run}/{average}".lower()
        if (versions := services.catalog.versions(status.run, average))
    ]
    newest.sort(key=lambda version: version.created, reverse=True)
    return tuple(HubListedOut(**_described(services, version), tags=TAGS) for version in newest[:limit])


@router.get(_API, operation_id="hub_model_info", response_model_exclude_none=True)
async def model_info(run: str, average: str, services: ServicesDep, blobs: bool = False) -> HubModelOut:
    """The newest version of an average. `blobs` adds the sizes and ids of its files."""
    return await _model(services, _find(services, run, average, commit.MAIN), blobs)


@router.get(f"{_API}/revision/{{rev:path}}", operation_id="hub_revision_info", response_model_exclude_none=True)
async def revision_info(run: str, average: str, rev: str, services: ServicesDep, blobs: bool = False) -> HubModelOut:
    """The version of an average that `rev` names: its 40 hex digits, `step-N` or `main`."""
    return await _model(services, _find(services, run, average, rev), blobs)


@router.get(f"{_API}/refs", operation_id="hub_refs")
async def refs(run: str, average: str, services: ServicesDep) -> HubRefsOut:
    """The branch `main` and the tags of an average."""
    return commit.refs(average_versions(services, run, average))


@router.get(f"{_API}/tree/{{rev}}", operation_id="hub_tree", response_model_exclude_none=True)
async def tree(
    run: str, average: str, rev: str, services: ServicesDep, recursive: bool = False, expand: bool = False
) -> tuple[HubEntryOut, ...]:
    """The files and folders of a version; with `recursive` also those in its folders."""
    version = _find(services, run, average, rev)
    return commit.below(await _entries(services, version, expand=expand), "", recursive=recursive)


@router.get(f"{_API}/tree/{{rev}}/{{path:path}}", operation_id="hub_subtree", response_model_exclude_none=True)
async def subtree(
    run: str, average: str, rev: str, path: str, services: ServicesDep, recursive: bool = False, expand: bool = False
) -> tuple[HubEntryOut, ...]:
    """The files of one folder of a version."""
    version = _find(services, run, average, rev)
    listed = await _entries(services, version, expand=expand)
    found = commit.below(listed, path.strip("/"), recursive=recursive)
    if not found:
        raise _no_entry(version, Problem(Code.FILE_NOT_FOUND, f"version {version.id} has no folder {path[:100]!r}"))
    return found


@router.post(
    f"{_API}/paths-info/{{rev:path}}",
    operation_id="hub_paths_info",
    response_model_exclude_none=True,
    openapi_extra=_PATHS_BODY,
)
async def paths_info(
    run: str, average: str, rev: str, request: Request, services: ServicesDep
) -> tuple[HubEntryOut, ...]:
    """Those files and folders of a version that the body, a form or JSON, names; paths that it lacks are left out."""
    version = _find(services, run, average, rev)
    try:
        paths, expand = commit.paths_in(await request.body(), request.headers.get("content-type", ""))
    except (ValueError, RecursionError) as error:  # the latter by deep nesting
        raise Problem(Code.INVALID, f"the body is neither a form nor JSON with paths: {error}") from None
    return tuple(entry for entry in await _entries(services, version, expand=expand) if entry.path in paths)


@router.head(_RAW, include_in_schema=False, response_class=Response)
@router.get(_RAW, include_in_schema=False, response_class=Response)
@router.head(
    _FILE,
    operation_id="hub_head_file",
    response_class=Response,
    responses=_RESPONSES,
    description="The headers that GET would send.",
)
@router.get(
    _FILE,
    operation_id="hub_get_file",
    response_class=Response,
    responses=_RESPONSES,
    description=(
        "A file of a version. A branch or tag is redirected to the version. X-Repo-Commit has the version's id, "
        "X-Linked-Etag and X-Linked-Size have the file's sha256 and size."
    ),
)
async def file(run: str, average: str, rev: str, path: str, request: Request, services: ServicesDep) -> Response:
    version = _find(services, run, average, rev)
    readme = (await _card(services, version)).text if path == README and not version.file(README) else None
    try:
        entry = find_file(version, path) if readme is None else _entry_of(README, readme)
    except Problem as problem:
        raise _no_entry(version, problem) from None
    headers = {
        "X-Repo-Commit": version.id,
        "X-Linked-Etag": f'"{entry.sha256}"',
        "X-Linked-Size": str(entry.size),
        "X-EMA-Step": str(version.step),
    }
    if is_alias(rev):
        target = f"/{run}/{average}/resolve/{version.id}/{entry.name}"
        refuse_resume(f"…{target}", request.headers, parts=True)
        link = {"Location": _address(request, target), "Cache-Control": "no-cache"}
        return Response(status_code=307, headers={**link, **headers})
    if readme is None:
        return Download(services, version, entry, headers)
    return _generated(readme, request, headers | immutable_headers(services, f'"{entry.sha256}"'))


def _generated(content: bytes, request: Request, headers: dict[str, str]) -> Response:
    """The response that sends a file which is made on request: whole, one range of it, or 304."""
    if is_unmodified(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    headers["Accept-Ranges"] = "bytes"
    wanted = request.headers.get("range")
    ranges = None
    if wanted is not None and request.method == "GET" and request.headers.get("if-range") in (None, headers["ETag"]):
        ranges = parse_ranges(satisfiable(wanted, len(content)) or "")
    if ranges is None or len(ranges) > 1:
        return Response(content, headers=headers, media_type=_MARKDOWN)
    first, last = ranges[0][0] or 0, ranges[0][1] or 0  # `satisfiable` gives both
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Response(content[first : last + 1], status_code=206, headers=headers, media_type=_MARKDOWN)


def _find(services: Services, run: str, average: str, rev: str) -> Version:
    return find_version(services, run, average, "latest" if rev in commit.NEWEST else rev)


def _no_entry(version: Version, problem: Problem) -> Problem:
    """The problem with the version's id, by which clients remember that it has no such file."""
    return Problem(problem.code, problem.detail, headers={"X-Repo-Commit": version.id})


def _entry_of(name: str, content: bytes) -> FileEntry:
    return FileEntry(name, len(content), hashlib.sha256(content).hexdigest())


def _address(request: Request, path: str) -> str:
    """`path` on this host, below the prefix that a reverse proxy says it removes (`X-Forwarded-Prefix`).

    Clients of the Hub do not resolve a link against the address of the request, as the rest of the API relies on: they
    put it in the place of the path (huggingface_hub 0.36 and 1.0, and the clients in Rust).
    """
    prefix = request.headers.get("x-forwarded-prefix", "")
    return quote(f"{prefix.rstrip('/') if _PREFIX.fullmatch(prefix) else ''}{path}")


async def _card(services: Services, version: Version) -> Card:
    def read() -> Card:
        with reading(services, version):
            return read_card(version)

    return await anyio.to_thread.run_sync(read)


async def _entries(services: Services, version: Version, *, expand: bool) -> tuple[HubEntryOut, ...]:
    listed = commit.entries(version, (await _card(services, version)).text)
    return commit.expanded(listed, version) if expand else listed


def _described(services: Services, version: Version) -> dict[str, Any]:
    """What a model in a list and a single one have in common."""
    repository = f"{version.run}/{version.average}"
    return {
        "id": repository,
        "model_id": repository,
        "author": version.run,
        "sha": version.id,
        "last_modified": version.created,
        "private": services.config.token is not None,
    }


async def _model(services: Services, version: Version, blobs: bool) -> HubModelOut:
    card = await _card(services, version)
    data: dict[str, Any] = {"tags": card.tags}
    if card.library is not None:
        data["library_name"] = card.library
    index = await _index(services, version)
    if index:
        data["model-index"] = index
    return HubModelOut(
        **_described(services, version),
        tags=card.tags,
        library_name=card.library,
        card_data=data,
        used_storage=content_nbytes(version.files),
        siblings=commit.siblings(commit.entries(version, card.text), blobs=blobs),
    )


async def _index(services: Services, version: Version) -> list[dict[str, Any]]:
    """The scores of a version. Without them it can still be loaded: a database that fails is logged."""
    try:
        reports = await asyncio.wrap_future(services.metrics.reports(version.run, version.id))
    except MetricStoreError as error:
        log.warning("the scores of %s/%s are left out: %s", version.run, version.average, error)
        return []
    return model_index(version, reports)
