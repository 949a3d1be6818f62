"""The read routes of the Hugging Face Hub: `HF_ENDPOINT=http://SERVER` makes its clients load averages from here.

The repository `RUN/AVERAGE` has one commit for each version, with the version's id. The branch `main` is the newest
version; each step has a tag `step-N`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any
from urllib.parse import parse_qs, quote

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from ema_server.evaluation.metric_store import MetricStoreError
from ema_server.http.conditional import immutable_headers, is_unmodified
from ema_server.http.download import Download
from ema_server.http.hub import commit
from ema_server.http.hub.card import README, Card, model_index, read_card
from ema_server.http.hub.schemas import HubEntryOut, HubModelOut, HubRefsOut
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import average_versions, find_file, find_version, is_alias, reading, refuse_resume
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.catalog import FileEntry, Version, content_nbytes

_API = "/api/models/{run}/{average}"
_FILE = "/{run}/{average}/resolve/{rev}/{path:path}"
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file", **_BYTES},
    206: {"description": "The ranges asked for", **_BYTES},
    304: {"description": "Not modified"},
    307: {"description": "`rev` is a branch or tag: see Location"},
    409: {"model": ProblemOut, "description": "`rev` is a branch or tag, and a download through it cannot be resumed"},
    412: {"model": ProblemOut, "description": "If-Match or If-Unmodified-Since is of another file"},
    416: {"model": ProblemOut, "description": "No range lies in the file: see Content-Range"},
}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "required": ["paths"],
                    "properties": {"paths": {"type": "array", "items": {"type": "string"}}},
                }
            }
        },
    }
}

log = logging.getLogger(__name__)
router = APIRouter(tags=["hub"])


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
    run: str, average: str, rev: str, services: ServicesDep, recursive: bool = False
) -> tuple[HubEntryOut, ...]:
    """The files and folders of a version; with `recursive` also those in its folders."""
    listed = await _entries(services, _find(services, run, average, rev))
    return commit.below(listed, "", recursive=recursive)


@router.get(f"{_API}/tree/{{rev}}/{{path:path}}", operation_id="hub_subtree", response_model_exclude_none=True)
async def subtree(
    run: str, average: str, rev: str, path: str, response: Response, services: ServicesDep, recursive: bool = False
) -> tuple[HubEntryOut, ...]:
    """The files of one folder of a version."""
    version = _find(services, run, average, rev)
    found = commit.below(await _entries(services, version), path.strip("/"), recursive=recursive)
    if not found:
        raise _no_entry(version, Problem(Code.FILE_NOT_FOUND, f"version {version.id} has no folder {path[:100]!r}"))
    return found


@router.post(
    f"{_API}/paths-info/{{rev:path}}",
    operation_id="hub_paths_info",
    response_model_exclude_none=True,
    openapi_extra=_FORM,
)
async def paths_info(
    run: str, average: str, rev: str, request: Request, services: ServicesDep
) -> tuple[HubEntryOut, ...]:
    """Those files and folders of a version that the body names; paths that it lacks are left out."""
    listed = await _entries(services, _find(services, run, average, rev))
    paths = parse_qs((await request.body()).decode(errors="replace")).get("paths", [])
    return tuple(entry for entry in listed if entry.path in paths)


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
        link = {"Location": _link_from_root(request, target), "Cache-Control": "no-cache"}
        return Response(status_code=307, headers={**link, **headers})
    if readme is None:
        return Download(services, version, entry, headers)
    headers |= immutable_headers(services, f'"{entry.sha256}"')
    if is_unmodified(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(readme, headers=headers, media_type="text/markdown")


def _find(services: Services, run: str, average: str, rev: str) -> Version:
    return find_version(services, run, average, "latest" if rev == commit.MAIN else rev)


def _no_entry(version: Version, problem: Problem) -> Problem:
    """The problem with the version's id, by which clients remember that it has no such file."""
    return Problem(problem.code, problem.detail, headers={"X-Repo-Commit": version.id})


def _entry_of(name: str, content: bytes) -> FileEntry:
    return FileEntry(name, len(content), hashlib.sha256(content).hexdigest())


def _link_from_root(request: Request, path: str) -> str:
    """`path` relative to the request's, by way of the root of the server.

    It holds behind a reverse proxy that adds a prefix. Old clients (huggingface_hub 0.36 and 1.0) put a relative link
    in the place of the whole path instead of resolving it: the leading `..` lead to the root there too.
    """
    raw_path: bytes = request.scope["raw_path"]
    depth = raw_path.count(b"/") - 1
    return "../" * depth + quote(path.removeprefix("/"))


async def _card(services: Services, version: Version) -> Card:
    def read() -> Card:
        with reading(services, version):
            return read_card(version)

    return await anyio.to_thread.run_sync(read)


async def _entries(services: Services, version: Version) -> tuple[HubEntryOut, ...]:
    return commit.entries(version, (await _card(services, version)).text)


async def _model(services: Services, version: Version, blobs: bool) -> HubModelOut:
    card = await _card(services, version)
    data: dict[str, Any] = {"tags": card.tags}
    if card.library is not None:
        data["library_name"] = card.library
    index = await _index(services, version)
    if index:
        data["model-index"] = index
    return HubModelOut(
        id=f"{version.run}/{version.average}",
        model_id=f"{version.run}/{version.average}",
        author=version.run,
        sha=version.id,
        last_modified=version.created,
        private=services.config.token is not None,
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
