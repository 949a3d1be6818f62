"""The JSON of the Hub's protocol, as types. The names of fields are the Hub's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from ema_server.http.schemas import Out


class HubOut(Out):
    """A part of a response of the Hub's protocol."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class HubLfsOut(HubOut):
    """The pointer by which git stands for a large file; `oid` is the sha256 of the file."""

    oid: str
    size: int
    pointer_size: int


class HubLastCommitOut(HubOut):
    """The version in which a file is listed."""

    id: str
    title: str
    date: str


class HubEntryOut(HubOut):
    """A file or folder of a commit. `oid` is its object id in git, 40 hex digits; `lastCommit` only with `expand`."""

    type: Literal["file", "directory"]
    path: str
    size: int
    oid: str
    lfs: HubLfsOut | None = None
    last_commit: HubLastCommitOut | None = None


class HubBlobLfsOut(HubOut):
    """The pointer of a large file, as `siblings` have it."""

    sha256: str
    size: int
    pointer_size: int


class HubSiblingOut(HubOut):
    """A file of a commit; only `rfilename` unless `blobs=true` asks for more."""

    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: HubBlobLfsOut | None = None


class HubListedOut(HubOut):
    """An average at one version. `sha` is the version's id."""

    id: str
    model_id: str
    author: str
    sha: str
    last_modified: str
    private: bool
    gated: Literal[False] = False
    disabled: Literal[False] = False
    downloads: int = 0
    likes: int = 0
    tags: tuple[str, ...]


class HubModelOut(HubListedOut):
    """An average at one version with its files; `cardData` has its scores under `model-index`."""

    library_name: str | None = Field(default=None, alias="library_name")
    card_data: dict[str, Any]
    used_storage: int
    siblings: tuple[HubSiblingOut, ...]


class HubRefOut(HubOut):
    """A branch or tag, and the version that it names."""

    name: str
    ref: str
    target_commit: str


class HubRefsOut(HubOut):
    """The branch `main`, which is the newest version, and a tag `step-N` for each step."""

    branches: tuple[HubRefOut, ...]
    converts: tuple[HubRefOut, ...] = ()
    tags: tuple[HubRefOut, ...]
    pull_requests: tuple[HubRefOut, ...] = ()
