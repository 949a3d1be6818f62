"""Only whole generations are listed, and only verified ones are resumed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_server.storage.generation import open_generation, read_record, verify
from ema_server.storage.records import BrokenGeneration
from support.server_core import durable, joined, manifest_of, running_core


def _weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((300,), float(step)), "d": torch.full((3,), step / 3, dtype=torch.float64)}


_MANIFEST = manifest_of(_weights(1))


def _three_generations(data: Path) -> list[Path]:
    """Generations at steps 1, 2 and 3; their folders."""
    with running_core(data) as core:
        joined(core.join("r", _MANIFEST, ["raw", "ema:0.9"], config='{"a": 1}'))
        for step in (1, 2, 3):
            core.apply("r", step, _weights(step))
            durable(core.publish("r"))
        return [generation.folder for generation in reversed(core.catalog.generations("r"))]


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_generation_on_disk_equals_the_published_one(tmp_path: Path) -> None:
    folder = _three_generations(tmp_path)[1]
    generation = open_generation("r", folder)
    record = read_record(folder)
    verify(folder, record)

    assert folder.name == "00000002-000000000002"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {
        "generation.json",
        "manifest.json",
        *(f"averages/raw/{name}" for name in ("model.safetensors", "config.json", "version.json")),
        *(
            f"averages/ema-0.9/{name}"
            for name in ("model.safetensors", "state.safetensors", "config.json", "version.json")
        ),
    }
    assert set(record.files) | {"generation.json"} == written
    assert (record.run.step, record.run.applied, record.info.reason) == (2, 2, "request")
    for version in generation.versions:
        assert {file.name: file.size for file in version.files} == {
            path.name: path.stat().st_size for path in version.folder.iterdir()
        }


_NOT_WHOLE: dict[str, Callable[[Path], None]] = {
    "generation.json is missing, as before the last write": lambda folder: (folder / "generation.json").unlink(),
    "generation.json is cut short": lambda folder: _truncate_half(folder / "generation.json"),
    "generation.json is not an object": lambda folder: _write(folder / "generation.json", "[]"),
    "generation.json is of a newer format": lambda folder: _edit(folder / "generation.json", format=2),
    "generation.json lacks a key": lambda folder: _edit(folder / "generation.json", averages=None),
    "generation.json is another folder's": lambda folder: _edit(folder / "generation.json", seq=77),
    "generation.json lists no version.json": lambda folder: _edit(folder / "generation.json", files={}),
    "a file is missing": lambda folder: (folder / "averages/raw/model.safetensors").unlink(),
    "a file is cut short": lambda folder: _truncate(folder / "averages/ema-0.9/model.safetensors"),
    "the state is missing": lambda folder: (folder / "averages/ema-0.9/state.safetensors").unlink(),
    "an average's folder is missing": lambda folder: shutil.rmtree(folder / "averages/raw"),
}

_WRONG_BYTES: dict[str, Callable[[Path], None]] = {
    "a weight is flipped": lambda folder: _flip(folder / "averages/ema-0.9/model.safetensors", -1),
    "a header is flipped": lambda folder: _flip(folder / "averages/raw/model.safetensors", 12),
    "a state is flipped": lambda folder: _flip(folder / "averages/ema-0.9/state.safetensors", -3),
    "the manifest is flipped": lambda folder: _flip(folder / "manifest.json", 20),
    "the config is flipped": lambda folder: _flip(folder / "averages/raw/config.json", 2),
}


def _truncate_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("harm", _NOT_WHOLE.values(), ids=_NOT_WHOLE)
def test_incomplete_generation_is_not_listed_and_the_previous_one_resumed(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = _three_generations(tmp_path)[-1]
    harm(folder)
    with running_core(tmp_path) as core:
        assert [version.step for version in core.catalog.versions("r", "raw")] == [2, 1]
        assert not folder.exists()
        assert folder.with_name(f".bad-{folder.name}").is_dir()
        answer = joined(core.join("r", _MANIFEST, first_step=4))
        assert (answer.last_step, answer.continuation) == (2, "continued")
        core.apply("r", 4, _weights(4))
        assert durable(core.publish("r")).versions[0].seq == 4, "no number is given twice"


@pytest.mark.parametrize("harm", _WRONG_BYTES.values(), ids=_WRONG_BYTES)
def test_generation_with_wrong_bytes_is_not_resumed(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    folder = _three_generations(tmp_path)[-1]
    harm(folder)
    with pytest.raises(BrokenGeneration):
        verify(folder, read_record(folder))
    with running_core(tmp_path) as core:
        assert joined(core.join("r", _MANIFEST, first_step=4)).last_step == 2
        assert folder.with_name(f".bad-{folder.name}").is_dir()
        assert [version.step for version in core.catalog.versions("r", "raw")] == [2, 1]


def test_rewind_skips_a_generation_with_wrong_bytes(tmp_path: Path) -> None:
    folders = _three_generations(tmp_path)
    _flip(folders[1] / "averages/ema-0.9/model.safetensors", -1)
    with running_core(tmp_path) as core:
        answer = joined(core.join("r", _MANIFEST, first_step=3))
        assert (answer.continuation, answer.last_step) == ("rewound", 1)
        assert {version.step for version in core.catalog.versions("r", "raw")} == {1, 3}


def test_run_with_only_broken_generations_starts_again(tmp_path: Path) -> None:
    for folder in _three_generations(tmp_path):
        _truncate(folder / "averages/raw/model.safetensors")
    with running_core(tmp_path) as core:
        assert core.catalog.runs() == ()
        assert core.statuses.get("r") is None
        answer = joined(core.join("r", _MANIFEST, first_step=4))
        assert (answer.last_step, answer.continuation) == (None, "new")
        core.apply("r", 4, _weights(4))
        assert durable(core.publish("r")).versions[0].seq == 4


def test_same_weights_with_the_same_history_have_the_same_id(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        with running_core(tmp_path / name) as core:
            joined(core.join("r", _MANIFEST, ["raw", "ema:0.9"]))
            core.apply("r", 1, _weights(1))
            ids.append([version.id for version in durable(core.publish("r")).versions])

    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2
