"""Companion files on disk: part of every version, whole before the first one, never changed after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ema_proto.averages.rules import PowerEma
from ema_proto.averages.specs import parse_average
from ema_proto.limits import FILE_BYTES_MAX
from ema_proto.names import OWN_FILES
from ema_proto.wire.manifest import Role
from ema_server.averager.jobs import Joined, Refused
from ema_server.derived.recalibration import recalibrate
from ema_server.storage import companions, records
from ema_server.storage.catalog import FileEntry, Version
from ema_server.storage.companions import CompanionStore, DamagedFile
from ema_server.storage.disk import sha256
from ema_server.tensors.file_plan import MODEL_FILE, STATE_FILE
from support.memory_trainer import specs_of
from support.server_core import ServerCore, durable, joined, manifest_of, running_core, versions_by_average
from support.waiting import eventually

TENSORS = {"w": torch.arange(6, dtype=torch.float32)}
MANIFEST = manifest_of(TENSORS)
FILES = {"tokenizer.json": b'{"a": 1}', "templates/chat.jinja": b"{{ x }}", "empty.txt": b"", "same.json": b'{"a": 1}'}


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ServerCore]:
    with running_core(tmp_path / "data") as core:
        yield core


def start(core: ServerCore, files: dict[str, bytes] | None, run: str = "run", **join: object) -> None:
    answer = joined(core.join(run, MANIFEST, files=files, **join))  # type: ignore[arg-type]
    if files is not None and answer.missing_files:
        core.send(run, files, answer.missing_files)


def step(core: ServerCore, number: int, run: str = "run") -> dict[str, Version]:
    core.apply(run, number, {"w": TENSORS["w"] + number})
    return versions_by_average(core.publish(run))


def content(version: Version) -> dict[str, bytes]:
    """The companion files of a version as they are on the disk; every entry is checked."""
    for entry in version.files:
        assert (version.folder / entry.name).stat().st_size == entry.size
        assert sha256(version.folder / entry.name) == entry.sha256
    names = [entry.name for entry in version.files]
    assert len(set(names)) == len(names)
    return {name: (version.folder / name).read_bytes() for name in names if name not in OWN_FILES}


def stored(core: ServerCore, run: str = "run") -> set[str]:
    folder = core.data_dir.files_folder(run)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def digests(files: dict[str, bytes]) -> set[str]:
    return {spec.sha256 for spec in specs_of(files)}


def test_names_of_own_files_are_those_that_the_server_writes() -> None:
    own = {MODEL_FILE, STATE_FILE, records.CONFIG_FILE, records.VERSION_FILE, records.GENERATION_FILE}

    assert own | records.SECOND_NAMES == OWN_FILES


def test_every_average_has_the_files_as_links(core: ServerCore) -> None:
    start(core, FILES)
    versions = step(core, 1)

    assert set(versions) == {"raw", "ema-0.9"}
    for version in versions.values():
        assert content(version) == FILES
    inodes = {(version.folder / "tokenizer.json").stat().st_ino for version in versions.values()}
    inodes |= {(version.folder / "same.json").stat().st_ino for version in versions.values()}
    assert len(inodes) == 1, "no file takes the disk twice"
    assert stored(core) == digests(FILES)


def test_files_are_part_of_a_version_and_its_id(core: ServerCore) -> None:
    ids = set()
    for run, files in (("a", None), ("b", {"x.json": b"1"}), ("c", {"x.json": b"2"}), ("d", {"y.json": b"2"})):
        start(core, files, run)
        ids.add(step(core, 1, run)["raw"].id)
    assert len(ids) == 4


def test_a_trainer_that_comes_again_sends_only_what_is_missing(core: ServerCore) -> None:
    start(core, FILES)
    first = step(core, 1)["raw"]
    changed = {**FILES, "tokenizer.json": b'{"a": 2}'}
    del changed["empty.txt"]

    answer = joined(core.join("run", MANIFEST, first_step=2, files=changed))

    assert set(answer.missing_files) == digests({"": b'{"a": 2}'})
    between = step(core, 2)["raw"]
    assert content(between) == FILES, "the new files are not whole yet"
    core.send("run", changed, answer.missing_files)
    after = step(core, 3)["raw"]
    assert content(after) == changed
    assert content(first) == FILES, "a version keeps its files"
    eventually(lambda: stored(core) == digests(changed), "unused content is deleted")


def test_a_trainer_without_files_changes_nothing_and_an_empty_list_ends_them(core: ServerCore) -> None:
    start(core, FILES)
    step(core, 1)
    start(core, None, first_step=2)
    assert content(step(core, 2)["raw"]) == FILES
    start(core, {}, first_step=3)
    assert content(step(core, 3)["raw"]) == {}
    eventually(lambda: stored(core) == set(), "unused content is deleted")


def test_a_generation_without_new_snapshot_keeps_the_files(core: ServerCore) -> None:
    start(core, FILES)
    before = step(core, 1)["raw"]
    durable(core.publish("run", "checkpoint"))

    newest = core.catalog.generations("run")[0]
    again = next(version for version in newest.versions if version.average == "raw")

    assert newest.pinned
    assert again.folder != before.folder
    assert content(again) == FILES
    assert again.id == before.id


def test_a_restarted_server_goes_on_with_the_files(tmp_path: Path) -> None:
    with running_core(tmp_path / "data") as core:
        start(core, FILES)
        step(core, 1)
    with running_core(tmp_path / "data") as core:
        start(core, None, first_step=2)
        assert content(step(core, 2)["raw"]) == FILES
        assert joined(core.join("run", MANIFEST, first_step=3, files=FILES)).missing_files == ()


def test_content_that_was_lost_from_the_store_is_taken_from_the_newest_version(tmp_path: Path) -> None:
    with running_core(tmp_path / "data") as core:
        start(core, FILES)
        step(core, 1)
        folder = core.data_dir.files_folder("run")
    for path in folder.iterdir():
        path.unlink()
    with running_core(tmp_path / "data") as core:
        start(core, None, first_step=2)
        assert content(step(core, 2)["raw"]) == FILES


def test_a_damaged_file_is_sent_again_and_the_run_goes_on(tmp_path: Path) -> None:
    with running_core(tmp_path / "data") as core:
        start(core, FILES)
        step(core, 1)
        digest = specs_of(FILES)[0].sha256
        with (core.data_dir.files_folder("run") / digest).open("r+b") as file:
            file.write(b"X")
    with running_core(tmp_path / "data") as core:
        answer = joined(core.join("run", MANIFEST, first_step=2, files=FILES))
        assert answer.continuation == "continued"
        assert answer.missing_files == (digest,)
        core.send("run", FILES, answer.missing_files)
        assert content(step(core, 2)["raw"]) == FILES


def test_a_rewind_keeps_the_trainers_newest_files(core: ServerCore) -> None:
    start(core, {"a.json": b"1"})
    step(core, 1)
    start(core, {"a.json": b"2"}, first_step=2)
    step(core, 2)
    core.rewind("run", 1)
    assert content(step(core, 2)["raw"]) == {"a.json": b"2"}


def test_a_run_set_aside_takes_its_files_along(core: ServerCore) -> None:
    start(core, FILES)
    step(core, 1)
    answer = joined(core.join("run", MANIFEST, resume="never", files={"a.json": b"1"}))
    assert answer.set_aside is not None
    assert answer.missing_files
    old = core.catalog.generations(answer.set_aside)[0].versions[0]
    assert content(old) == FILES


def test_deleting_a_run_deletes_its_files(core: ServerCore, tmp_path: Path) -> None:
    start(core, FILES)
    step(core, 1)
    core.leave("run")
    core.delete("run")
    eventually(lambda: not list((tmp_path / "data" / "runs").iterdir()), "the files are erased")


def test_retention_deletes_links_and_not_what_is_in_use(tmp_path: Path) -> None:
    with running_core(tmp_path / "data", keep_generations=1) as core:
        start(core, FILES)
        versions = [step(core, number)["raw"] for number in range(1, 6)]
        eventually(lambda: not versions[2].folder.exists(), "an old generation is deleted")
        assert content(versions[-1]) == FILES
        assert stored(core) == digests(FILES)


def test_derived_versions_carry_the_files(core: ServerCore) -> None:
    tensors = {"w": torch.ones(2), "running_mean": torch.zeros(2)}
    manifest = manifest_of(tensors, roles={"running_mean": Role.BUFFER})
    answer = joined(core.join("run", manifest, ["power:sigma_rel=0.05", "power:sigma_rel=0.1"], files=FILES))
    core.send("run", FILES, answer.missing_files)
    for number in range(1, 4):
        core.apply("run", number, tensors)
        base = versions_by_average(core.publish("run"))["power-0.05"]
    rule = parse_average("power:sigma_rel=0.07")
    assert isinstance(rule, PowerEma)
    deriving = core.server.services.deriving
    assert content(deriving.synthesize("run", rule, None).version) == FILES
    assert content(recalibrate(deriving, base, save({"running_mean": torch.ones(2)}))[0]) == FILES


def test_with_an_adapter_config_the_model_has_the_name_of_an_adapter_too(core: ServerCore) -> None:
    start(core, {"adapter_config.json": b"{}"})
    version = step(core, 1)["raw"]

    model, adapter = version.file("model.safetensors"), version.file("adapter_model.safetensors")
    assert model is not None
    assert adapter == FileEntry("adapter_model.safetensors", model.size, model.sha256)
    content(version)
    assert (version.folder / model.name).samefile(version.folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "has_it"), [('{"_diffusers_version": "0.42.1"}', True), ('{"model_type": "bert"}', False), (None, False)]
)
def test_with_a_config_of_diffusers_the_model_has_the_name_that_diffusers_loads(
    core: ServerCore, config: str | None, has_it: bool
) -> None:
    joined(core.join("run", MANIFEST, config=config))
    version = step(core, 1)["raw"]

    model, second = version.file("model.safetensors"), version.file("diffusion_pytorch_model.safetensors")
    assert model is not None
    expected = FileEntry("diffusion_pytorch_model.safetensors", model.size, model.sha256)
    assert second == (expected if has_it else None)
    content(version)


def test_no_room_for_the_files_refuses_the_join(core: ServerCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "shortage", lambda folder, needed: f"{needed} bytes do not fit")
    answer = core.join("run", MANIFEST, files=FILES)
    assert isinstance(answer, Refused)
    assert "15 bytes do not fit" in answer.text
    assert isinstance(core.join("run", MANIFEST), Joined)


def test_what_arrives_damaged_leaves_nothing(core: ServerCore) -> None:
    core.data_dir.create_run("run")
    store = CompanionStore(core.data_dir)
    entry = FileEntry("a.json", 4, specs_of({"a.json": b"good"})[0].sha256)
    draft = store.receive("run", entry)

    assert not draft.write(b"ba")
    with pytest.raises(DamagedFile, match="arrived damaged"):
        draft.write(b"d!")
    draft.discard()
    assert stored(core) == set()
    with pytest.raises(OSError, match="No such file"):
        store.receive("no-such-run", entry)


def test_an_unfinished_file_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    with running_core(tmp_path / "data") as core:
        core.data_dir.create_run("run")
        draft = CompanionStore(core.data_dir).receive("run", FileEntry("a.json", FILE_BYTES_MAX, "0" * 64))
        draft.write(b"half")
        (left,) = stored(core)
        folder = core.data_dir.files_folder("run")
        (folder / left).rename(folder / "kept")
        draft.discard()
    (folder / "kept").rename(folder / left)  # as a crash leaves it
    with running_core(tmp_path / "data") as core:
        assert stored(core) == set()
