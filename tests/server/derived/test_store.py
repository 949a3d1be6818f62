"""Derived versions are durable, immutable and listed like all others; retention does not delete them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from ema_proto.errors import LocalProtocolError
from ema_server.derived.store import Derivation, DerivedStore
from ema_server.storage.catalog import Catalog, Version, VersionGone
from ema_server.storage.datadir import DataDir, open_data_dir
from support.server_core import durable, joined, manifest_of, running_core

_WHAT = Derivation("r", "best", "ema:0.9", 7, 5, 2, "synthesized", {"inputs": [1, 2]})
_WEIGHTS = {"w": torch.arange(6.0)}


class _Place:
    """A data folder with a catalog and a store, as a server has them."""

    def __init__(self, data_dir: DataDir) -> None:
        self.data_dir = data_dir
        self.catalog = Catalog()
        self.store = DerivedStore(self.data_dir, self.catalog, wall=lambda: 0.0)
        self.store.restore()

    def write(self, what: Derivation = _WHAT, config: bytes | None = b"{}") -> Version:
        data = save(_WEIGHTS)
        return self.store.write(what, [data[:10], memoryview(data)[10:]], config)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[_Place]:
    data_dir = open_data_dir(tmp_path)
    data_dir.create_run("r")
    yield _Place(data_dir)
    data_dir.close()


def _reopened(place: _Place) -> _Place:
    place.data_dir.sweep()
    return _Place(place.data_dir)


def _folders(place: _Place) -> list[str]:
    return sorted(path.name for path in place.data_dir.derived_folder("r").iterdir())


def test_derived_version_is_listed_like_any_other(place: _Place) -> None:
    version = place.write()

    assert (version.average, version.spec, version.step, version.updates, version.gap_steps) == (
        "best",
        "ema:0.9",
        7,
        5,
        2,
    )
    assert version.derived == "synthesized"
    assert [file.name for file in version.files] == ["config.json", "model.safetensors", "version.json"]
    assert torch.equal(load_file(version.folder / "model.safetensors")["w"], _WEIGHTS["w"])
    for rev in ("latest", "step-7", version.id):
        assert place.catalog.find("r", "best", rev) == version
    assert place.catalog.derived_averages("r") == ("best",)
    assert place.store.provenance(version) == {"kind": "synthesized", "inputs": [1, 2]}


def test_derived_version_survives_a_restart(place: _Place) -> None:
    version = place.write(config=None)
    again = _reopened(place)

    assert again.catalog.versions("r", "best") == (version,)


def test_equal_content_is_one_version(place: _Place) -> None:
    first = place.write()
    place.store._wall = lambda: 1e9
    assert place.write() == first
    other = place.write(replace(_WHAT, provenance={"inputs": [1, 3]}))

    assert other.id != first.id
    assert place.catalog.versions("r", "best") == (other, first)
    assert _folders(place) == ["00000001-000000000007", "00000002-000000000007"]


def _fails() -> Iterator[bytes]:
    yield b"half"
    raise OSError(28, "No space left on device")


def test_failed_write_leaves_nothing(place: _Place) -> None:
    with pytest.raises(OSError, match="No space left"):
        place.store.write(_WHAT, _fails(), None)

    assert _folders(place) == []
    assert place.catalog.derived("r") == ()


def test_name_with_a_path_is_refused(place: _Place) -> None:
    with pytest.raises(LocalProtocolError, match="average"):
        place.write(replace(_WHAT, average="../up"))
    assert not place.data_dir.derived_folder("r").exists()


def test_unfinished_versions_are_deleted_and_broken_ones_renamed(place: _Place) -> None:
    kept, torn = place.write(), place.write(replace(_WHAT, average="torn"))
    (torn.folder / "model.safetensors").write_bytes(b"short")
    (kept.folder.parent / ".tmp-abc").mkdir()
    again = _reopened(place)

    assert again.catalog.derived("r") == (kept,)
    assert _folders(again) == [".bad-" + torn.folder.name, kept.folder.name]
    assert again.write(replace(_WHAT, average="next")).seq == 3, "no number is given twice"


def test_mark_of_a_superseded_version_is_durable(place: _Place, monkeypatch: pytest.MonkeyPatch) -> None:
    version = place.write()
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    place.store.supersede("r", version.step)
    assert (place.store.is_superseded(version), synced) == (False, [])
    place.store.supersede("r", version.step - 1)
    assert place.store.is_superseded(version)
    assert synced == [version.folder.stat().st_ino]


def test_held_version_is_not_deleted(place: _Place) -> None:
    version = place.write()
    with place.catalog.hold(version):
        assert not place.store.delete(version)
    assert not place.store.delete(version), "a download in parts comes back"
    place.catalog._clock = lambda: 1e12
    assert place.store.delete(version)
    assert (place.catalog.versions("r", "best"), _folders(place)) == ((), [])
    with pytest.raises(VersionGone), place.catalog.hold(version):
        pass


def test_run_set_aside_during_a_write_gets_no_version(place: _Place) -> None:
    place.write()

    def pieces() -> Iterator[bytes]:
        yield b"first"
        place.data_dir.run_folder("r").rename(place.data_dir.run_folder("r.old"))
        place.catalog.move("r", "r.old", place.data_dir.run_folder("r.old"))
        place.data_dir.derived_folder("r").mkdir(parents=True)

    with pytest.raises(VersionGone, match="was set aside or deleted while best was made: ask again"):
        place.store.write(_WHAT, pieces(), None)
    assert place.catalog.derived("r") == ()
    moved = place.catalog.versions("r.old", "best")[0]
    assert load_file(moved.folder / "model.safetensors").keys() == {"w"}


def test_derived_versions_survive_retention_rewinds_and_renames(tmp_path: Path) -> None:
    weights: dict[str, Any] = {"w": torch.ones(3)}
    manifest = manifest_of(weights)
    with running_core(tmp_path, keep_generations=1) as core:
        store = DerivedStore(core.data_dir, core.catalog)
        joined(core.join("r", manifest))
        core.apply("r", 1, weights)
        durable(core.publish("r"))
        version = store.write(replace(_WHAT, step=1), [save(_WEIGHTS)], None)
        for step in (2, 3, 4):
            core.apply("r", step, weights)
            durable(core.publish("r"))
        assert core.catalog.versions("r", "best") == (version,)

        joined(core.join("r", manifest, resume="never"))
        aside = next(run for run in core.catalog.runs() if run != "r")
        assert core.catalog.derived("r") == ()
        moved = core.catalog.versions(aside, "best")[0]
        assert (moved.id, moved.run) == (version.id, aside)
        assert (moved.folder / "model.safetensors").is_file()
    with closing(open_data_dir(tmp_path)) as data_dir:
        assert [found.id for found in _Place(data_dir).catalog.versions(aside, "best")] == [version.id]


def test_run_deleted_during_a_write_is_not_made_again(place: _Place) -> None:
    def pieces() -> Iterator[bytes]:
        yield save(_WEIGHTS)
        place.data_dir.set_deleted("r")
        place.catalog.delete("r")

    for written in (pieces(), iter([save(_WEIGHTS)])):
        with pytest.raises(VersionGone, match="was set aside or deleted while best was made: ask again"):
            place.store.write(_WHAT, written, None)
    assert place.catalog.derived("r") == ()
    assert place.data_dir.runs() == ()
