"""The files of a version as those of a commit of the Hub, with their object ids in git.

A file on the server's disk is listed as git-lfs lists it, by its sha256. The generated `README.md` is a plain file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qs

from ema_server.http.hub.card import README
from ema_server.http.hub.schemas import (
    HubBlobLfsOut,
    HubEntryOut,
    HubLastCommitOut,
    HubLfsOut,
    HubRefOut,
    HubRefsOut,
    HubSiblingOut,
)
from ema_server.storage.catalog import FileEntry, Version

MAIN = "main"
NEWEST = (MAIN, "HEAD")  # what clients call the newest version, besides our `latest`


def entries(version: Version, readme: bytes) -> tuple[HubEntryOut, ...]:
    """Every folder and file, folders first; `readme` is the generated one, unless the trainer gave one."""
    folders = sorted({file.name.rpartition("/")[0] for file in version.files if "/" in file.name})
    directories = (HubEntryOut(type="directory", path=path, size=0, oid=_folder_oid(version, path)) for path in folders)
    generated = () if version.file(README) else (_plain(README, readme),)
    return (*directories, *(_stored(file) for file in version.files), *generated)


def below(listed: Iterable[HubEntryOut], folder: str, *, recursive: bool) -> tuple[HubEntryOut, ...]:
    """The entries in `folder` (the whole commit if it is empty), or also those in its folders."""
    prefix = f"{folder}/" if folder else ""
    inside = (entry for entry in listed if entry.path.startswith(prefix))
    return tuple(entry for entry in inside if recursive or "/" not in entry.path.removeprefix(prefix))


def expanded(listed: Iterable[HubEntryOut], version: Version) -> tuple[HubEntryOut, ...]:
    """The entries with the version as their last commit."""
    last = HubLastCommitOut(id=version.id, title=f"step {version.step}", date=version.created)
    return tuple(entry.model_copy(update={"last_commit": last}) for entry in listed)


def paths_in(body: bytes, content_type: str) -> tuple[frozenset[str], bool]:
    """The paths, and `expand`, in the body of a request for them, which is a form or JSON.

    Raises:
        ValueError: it is neither.
    """
    if content_type.partition(";")[0].strip() == "application/json":
        value = json.loads(body)
        if not isinstance(value, dict) or not isinstance(paths := value.get("paths"), list):
            raise ValueError("paths is not a list")
        return frozenset(map(str, paths)), value.get("expand") is True
    form = parse_qs(body.decode())
    return frozenset(form.get("paths", ())), form.get("expand", ["false"])[0].lower() == "true"


def siblings(listed: Iterable[HubEntryOut], *, blobs: bool) -> tuple[HubSiblingOut, ...]:
    """The files among `listed`; with `blobs` also their sizes and ids."""
    files = (entry for entry in listed if entry.type == "file")
    if not blobs:
        return tuple(HubSiblingOut(rfilename=file.path) for file in files)
    return tuple(
        HubSiblingOut(rfilename=file.path, size=file.size, blob_id=file.oid, lfs=_blob_lfs(file.lfs)) for file in files
    )


def refs(versions: Sequence[Version]) -> HubRefsOut:
    """The branch `main` and the tags `step-N` of the versions of an average, which are newest first."""
    newest_of_step: dict[int, Version] = {}
    for version in versions:
        newest_of_step.setdefault(version.step, version)
    tags = tuple(
        HubRefOut(name=f"step-{step}", ref=f"refs/tags/step-{step}", target_commit=version.id)
        for step, version in newest_of_step.items()
    )
    branches = (HubRefOut(name=MAIN, ref=f"refs/heads/{MAIN}", target_commit=versions[0].id),) if versions else ()
    return HubRefsOut(branches=branches, tags=tags)


def _stored(file: FileEntry) -> HubEntryOut:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        file.sha256.encode(),
        file.size,
    )
    lfs = HubLfsOut(oid=file.sha256, size=file.size, pointer_size=len(pointer))
    return HubEntryOut(type="file", path=file.name, size=file.size, oid=_blob_oid(pointer), lfs=lfs)


def _plain(path: str, content: bytes) -> HubEntryOut:
    return HubEntryOut(type="file", path=path, size=len(content), oid=_blob_oid(content))


def _blob_lfs(lfs: HubLfsOut | None) -> HubBlobLfsOut | None:
    return None if lfs is None else HubBlobLfsOut(sha256=lfs.oid, size=lfs.size, pointer_size=lfs.pointer_size)


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _folder_oid(version: Version, path: str) -> str:
    """An id for a folder. Clients only show it, so that it need not be the one of a tree in git."""
    return hashlib.sha1(f"tree {version.id}/{path}".encode(), usedforsecurity=False).hexdigest()
