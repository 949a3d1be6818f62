"""The JSON of leases and validations as types. Holds no behaviour but validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ema_server.evaluation.leases import LEASE_S
from ema_server.http.schemas import Name, Out, VersionOut

Rev = Annotated[str, StringConstraints(min_length=1, max_length=60)]
VersionId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]


class AskIn(BaseModel):
    """A worker asks for a version to evaluate, and says which it would take and when it asks again."""

    model_config = ConfigDict(extra="forbid")

    worker: Name
    task: Name = "default"
    run: Name | None = None
    averages: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    every: Annotated[int, Field(ge=1, le=10**9)] = 1
    skip: Annotated[tuple[VersionId, ...], Field(max_length=1000)] = ()
    lease_s: Annotated[float, Field(ge=1, le=900, allow_inf_nan=False)] = LEASE_S
    poll_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 1.0


class LeaseOut(Out):
    """A claim to a version for a task; it ends with its result, or `expires_in_s` after the last heartbeat."""

    id: str
    task: str
    expires_in_s: float
    version: VersionOut


class GrantOut(Out):
    """A lease if a version is due. `held`: how many versions that are due are being evaluated by others."""

    lease: LeaseOut | None
    held: int


class BeatOut(Out):
    """The lease was extended."""

    expires_in_s: float


class ValidationIn(BaseModel):
    """Which version to evaluate. `again`: also if it has metrics for the task already."""

    model_config = ConfigDict(extra="forbid")

    average: Name
    rev: Rev = "latest"
    task: Name = "default"
    again: bool = False


class ValidationOut(Out):
    """A validation: `metrics` once it is done, `error` once it has failed; `note` says why nobody is at it."""

    id: str
    state: Literal["waiting", "running", "done", "failed"]
    run: str
    average: str
    version: str
    step: int
    task: str
    created: str
    metrics: dict[str, float]
    error: str | None
    samples: int | None
    seconds: float | None
    worker: str | None
    at: str | None
    note: str | None
