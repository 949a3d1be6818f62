"""Versions are found by id, step or `latest`, and are not deleted while a reader holds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_server.storage.catalog import Catalog, Generation, Version, VersionGone


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _generation(seq: int, step: int, ids: str = "", *, run: str = "r") -> Generation:
    """A generation of averages `a` and `b`; `ids` are the first digits of their ids."""
    folder = Path(f"/data/runs/{run}/generations/{seq:08d}-{step:012d}")
    first = ids or f"{seq:02d}"
    versions = tuple(
        Version(f"{first}{name}".ljust(40, "0"), run, name, "raw", step, 1, 0, "", (), folder / "averages" / name, seq)
        for name in ("a", "b")
    )
    return Generation(run, seq, step, False, False, folder, versions)


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog(_Clock())
    for generation in (_generation(2, 20), _generation(1, 10), _generation(3, 30)):
        catalog.add(generation)
    return catalog


def test_versions_are_listed_newest_first(catalog: Catalog) -> None:
    assert [version.step for version in catalog.versions("r", "a")] == [30, 20, 10]
    assert catalog.runs() == ("r",)
    assert catalog.averages("r") == ("a", "b")


def test_unknown_runs_and_averages_have_no_versions(catalog: Catalog) -> None:
    assert catalog.versions("r", "c") == ()
    assert catalog.versions("x", "a") == ()
    assert catalog.averages("x") == ()
    assert catalog.find("x", "a", "latest") is None


@pytest.mark.parametrize(
    ("rev", "seq"),
    [
        ("latest", 3),
        ("step-20", 2),
        ("02a".ljust(40, "0"), 2),
        ("step-25", None),
        ("step-", None),
        ("02b".ljust(40, "0"), None),
        ("02A".ljust(40, "0"), None),
        ("02a", None),
        ("best", None),
        ("", None),
    ],
)
def test_each_way_to_name_a_version(catalog: Catalog, rev: str, seq: int | None) -> None:
    found = catalog.find("r", "a", rev)

    assert (found.seq if found else None) == seq


def test_version_is_listed_once_after_a_rewind_and_its_step_names_the_newest(catalog: Catalog) -> None:
    catalog.add(_generation(4, 10, "01"))
    catalog.add(_generation(5, 20))

    assert [(version.step, version.seq) for version in catalog.versions("r", "a")] == [
        (20, 5),
        (10, 4),
        (30, 3),
        (20, 2),
    ]
    found = catalog.find("r", "a", "step-20")
    assert found is not None
    assert found.seq == 5


def test_held_generation_stays_until_a_minute_after() -> None:
    clock = _Clock()
    catalog = Catalog(clock)
    generation = _generation(1, 10)
    catalog.add(generation)
    version = generation.versions[0]
    with catalog.hold(version):
        with catalog.hold(version):
            assert not catalog.remove(generation)
        clock.now += 100
        assert not catalog.remove(generation), "one of two holds is left"
    clock.now += 59
    assert not catalog.remove(generation)
    assert catalog.find("r", "a", "latest") == version
    clock.now += 2
    assert catalog.remove(generation)
    assert catalog.find("r", "a", "latest") is None


def test_removed_version_cannot_be_held(catalog: Catalog) -> None:
    generation = catalog.generations("r")[0]
    assert catalog.remove(generation)
    with pytest.raises(VersionGone, match="list again"), catalog.hold(generation.versions[0]):
        pass


def test_broken_generation_is_removed_even_if_held(catalog: Catalog) -> None:
    generation = catalog.generations("r")[0]
    with catalog.hold(generation.versions[0]):
        assert catalog.remove(generation, force=True)
    assert [version.step for version in catalog.versions("r", "a")] == [20, 10]


def test_renamed_run_is_found_only_under_its_new_name(catalog: Catalog) -> None:
    catalog.move("r", "r.old", Path("/data/runs/r.old"))

    assert catalog.runs() == ("r.old",)
    assert catalog.versions("r", "a") == ()
    moved = catalog.find("r.old", "a", "step-20")
    assert moved is not None
    assert (moved.run, str(moved.folder)) == ("r.old", "/data/runs/r.old/generations/00000002-000000000020/averages/a")
