"""The model of a run, as derived versions need it: its manifest, and the tensors that are exempt from averaging."""

from __future__ import annotations

from dataclasses import dataclass

from ema_proto.wire.manifest import Manifest
from ema_server.storage.catalog import Catalog, VersionGone
from ema_server.storage.generation import read_manifest, read_record


@dataclass(frozen=True, slots=True)
class RunModel:
    """The manifest, which is the same in every generation, and the exempt tensors of the newest one."""

    manifest: Manifest
    exempt: frozenset[str]


def model_of(catalog: Catalog, run: str) -> RunModel:
    """The model of a run.

    Raises:
        BrokenGeneration: the newest generation is damaged.
        VersionGone: the run has no generation.
    """
    newest = next(iter(catalog.generations(run)), None)
    if newest is None:
        raise VersionGone(f"run {run} no longer has a generation: ask again")
    record = read_record(newest.folder)
    return RunModel(read_manifest(newest.folder, record), frozenset(record.run.exempt))
