"""Derived versions (computed from stored versions): what their routes share, and their deletion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from fastapi import APIRouter

from ema_server.derived.queue import Busy, Stopped
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import RETRY_AFTER_S, find_version, is_alias
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import Services, ServicesDep
from ema_server.runs.status_store import RunStatus
from ema_server.storage.catalog import VersionGone
from ema_server.storage.disk import shortage
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.safetensors_file import BadModelFile

Result = TypeVar("Result")

router = APIRouter(prefix="/v1/runs/{run}", tags=["derived versions"])


@router.delete(
    "/averages/{average}/versions/{id}",
    operation_id="delete_version",
    status_code=204,
    responses={409: {"model": ProblemOut, "description": "The version is not derived, or is being read"}},
)
async def delete(run: str, average: str, id: str, services: ServicesDep) -> None:
    """Delete a derived version, named by its 40 hex digits. Retention deletes other versions."""
    version = find_version(services, run, average, id)
    if is_alias(id):
        raise Problem(Code.INVALID, f"{id!r} is an alias and may move: give the 40 hex digits, now {version.id}")
    if version.derived is None:
        detail = f"version {version.id} belongs to a generation: retention deletes it (--keep-generations)"
        raise Problem(Code.NOT_DERIVED, detail)
    if not await anyio.to_thread.run_sync(services.deriving.store.delete, version):
        detail = f"version {version.id} is being downloaded or evaluated, or was a moment ago: try again in a minute"
        raise Problem(Code.VERSION_HELD, detail)


async def derive(services: Services, nbytes: int, work: Callable[[], Result]) -> Result:
    """Call `work` in the thread for derived versions and return its result.

    Args:
        services: of the server.
        nbytes: about how much it will write.
        work: makes the version.

    Raises:
        Problem: the disk is full or fails, what is stored is damaged, the queue is full, or the server is stopping.
    """
    await anyio.to_thread.run_sync(_check_room, services, nbytes)
    try:
        return await services.deriving.run(work)
    except Busy as error:
        raise busy(str(error)) from None
    except Stopped:
        raise Problem(Code.NOT_READY, "the server is stopping: ask again when it is back") from None
    except (BrokenGeneration, BadModelFile) as error:
        raise Problem(Code.DAMAGED, str(error)) from None
    except VersionGone as error:
        raise Problem(Code.DERIVE_FAILED, str(error)) from None
    except FileNotFoundError as error:
        detail = f"{error.filename} was removed, because the run was rewound, set aside or deleted: ask again"
        raise Problem(Code.DERIVE_FAILED, detail) from None
    except OSError as error:
        raise Problem(Code.DERIVE_FAILED, f"it could not be written or read: {error.strerror or error}") from None


def refuse_taken(services: Services, status: RunStatus, name: str) -> None:
    """Refuse the name of an average that the run keeps itself, in whatever case."""
    kept = {item.average for item in services.catalog.versions(status.run, name) if item.derived is None}
    kept |= {average.name for average in status.averages if average.name.lower() == name.lower()}
    if kept:
        detail = (
            f"run {status.run!r} keeps an average {min(kept)!r} itself: download that, or ask for this one under "
            "another name"
        )
        raise Problem(Code.NAME_TAKEN, detail)


def busy(detail: str) -> Problem:
    """A problem that says when to try again."""
    return Problem(Code.BUSY, detail, headers={"Retry-After": str(RETRY_AFTER_S)})


def _check_room(services: Services, nbytes: int) -> None:
    """A derived version must not take the space that the next generations need."""
    short = shortage(services.config.data, services.needed_bytes() + nbytes)
    if short is not None:
        detail = (
            f"{short}: {nbytes} for the version, the rest must stay free for the runs: delete what is not needed, for "
            "example other derived versions (DELETE …/versions/{id})"
        )
        raise Problem(Code.NO_ROOM, detail)
