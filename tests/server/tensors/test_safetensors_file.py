"""Headers and files, compared with the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ema_server.tensors.safetensors_file import BadModelFile, describe, read_header, replaced

_TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(_TENSORS, path, metadata={"format": "pt"})
    return path


def test_every_tensor_is_found_at_its_offset(path: Path) -> None:
    data = path.read_bytes()
    for stored in read_header(path):
        value = _TENSORS[stored.name]
        assert (stored.shape, stored.elements) == (tuple(value.shape), value.numel())
        held = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        assert data[stored.offset : stored.offset + stored.nbytes] == held


def test_safetensors_library_reads_a_described_file(tmp_path: Path) -> None:
    header, placed = describe([("b.ü", "F32", (2, 2)), ("a", "I64", ()), ("none", "F32", (0,))])
    path = tmp_path / "new.safetensors"
    path.write_bytes(header + struct.pack("<4f", 1, 2, 3, 4) + struct.pack("<q", 9))

    loaded = safetensors.torch.load_file(path)
    assert loaded["b.ü"].tolist() == [[1, 2], [3, 4]]
    assert (loaded["a"].item(), loaded["none"].numel()) == (9, 0)
    assert {at.name: at.offset for at in placed} == {at.name: at.offset for at in read_header(path)}


def test_replaced_changes_only_the_given_tensors(path: Path) -> None:
    new = b"".join(replaced(path, {"count": struct.pack("<q", 8), "weight": bytes(48)}))

    loaded = safetensors.torch.load(new)
    assert loaded["count"].item() == 8
    assert not loaded["weight"].any()
    assert torch.equal(loaded["half"], _TENSORS["half"])
    assert b"".join(replaced(path, {})) == path.read_bytes()


def test_replacing_tensors_adds_missing_format_metadata(tmp_path: Path) -> None:
    safetensors.torch.save_file(_TENSORS, tmp_path / "old.safetensors")
    (tmp_path / "new.safetensors").write_bytes(b"".join(replaced(tmp_path / "old.safetensors", {"weight": bytes(48)})))

    with safetensors.safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert not file.get_tensor("weight").any()
        assert torch.equal(file.get_tensor("half"), _TENSORS["half"])


@pytest.mark.parametrize(
    ("tensors", "text"), [({"weigth": b""}, "has no tensor 'weigth'"), ({"count": b"1234"}, "has 4 bytes")]
)
def test_tensor_that_does_not_fit_is_refused(path: Path, tensors: dict[str, bytes], text: str) -> None:
    with pytest.raises(BadModelFile, match=text):
        list(replaced(path, tensors))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 20,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{}",
        *(
            struct.pack("<Q", len(text)) + text
            for entry in ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [2]}, 3)
            for text in [json.dumps({"a": entry}).encode()]
        ),
    ],
)
def test_non_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(BadModelFile, match="bad is not a safetensors file"):
        read_header(path)
