"""Files of averages, read by safetensors: every dtype, tied names, odd sizes, a constant header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_server.compute.kernel import Target
from ema_server.compute.memory import Memory, allocate
from ema_server.compute.pool import WorkerPool
from ema_server.publishing.writer import DraftAverage, GenerationWriter
from ema_server.tensors.file_plan import files_of
from ema_server.tensors.layout import Form, held_nbytes
from support.server_core import all_segments, encode, manifest_of
from trainer_client.model.plan import Plan


def _odd_tensors() -> dict[str, Tensor]:
    """Odd counts of every size, so that a wrong order leaves something misaligned."""
    torch.manual_seed(0)
    floats = {
        str(dtype): torch.randn(3).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    whole = {
        str(dtype): torch.arange(5).to(dtype)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    }
    return (
        floats
        | whole
        | {"flags": torch.tensor([True, False, True]), "scalar": torch.randn(()), "none": torch.empty(2, 0)}
    )


def _write(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], form: Form) -> tuple[Path, Memory]:
    memory = allocate(held_nbytes(manifest, form))
    pool = WorkerPool(2, block_elements=4)
    pool.update(all_segments(manifest), encode(manifest, tensors), [Target(memory.data, form, None)], None)
    files = files_of(manifest, form)
    draft = GenerationWriter(folder, (DraftAverage(folder / "average", memory, files),))
    pool.write(all_segments(manifest), [form], draft)
    pool.close()
    draft.complete()
    draft.close()
    for file in files:
        assert (folder / "average" / file.name).stat().st_size == file.nbytes
    return folder / "average" / "model.safetensors", memory


def _published(form: Form, value: Tensor) -> Tensor:
    return value.float() if form is Form.WIDE and value.is_floating_point() else value


@pytest.mark.parametrize("form", list(Form))
def test_every_dtype_and_every_tied_name_is_loaded(tmp_path: Path, form: Form) -> None:
    tensors = _odd_tensors()
    aliases = {name: (f"{name}.tied", f"{name}.tied.again") for name in tensors}
    manifest = manifest_of(tensors, aliases=aliases)
    path, _ = _write(tmp_path / "g", manifest, tensors, form)

    loaded = load_file(path)
    expected = {alias: value for name, value in tensors.items() for alias in (name, *aliases[name])}
    assert set(loaded) == set(expected)
    for name, value in expected.items():
        assert loaded[name].shape == value.shape
        assert torch.equal(loaded[name], _published(form, value)), name


def test_float64_state_is_kept_in_full_beside_the_float32_model(tmp_path: Path) -> None:
    tensors = {"d": torch.randn(200_001, dtype=torch.float64), "s": torch.randn(3)}
    manifest = manifest_of(tensors)
    path, _ = _write(tmp_path / "g", manifest, tensors, Form.WIDE)

    assert torch.equal(load_file(path)["d"], tensors["d"].float())
    assert torch.equal(load_file(path.with_name("state.safetensors"))["d"], tensors["d"])


class _Model(nn.Module):
    """Buffers, one of them not in the state dict, a frozen parameter; tied embeddings if asked for."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.register_buffer("scratch", torch.rand(3), persistent=False)
        self.register_buffer("transposed", torch.rand(2, 3).t())
        self.norm.requires_grad_(False)
        if tied:
            self.head.weight = self.embed.weight


def _written(folder: Path, model: nn.Module) -> Path:
    manifest = Plan.of(model).manifest
    tensors = model.state_dict()
    path, _ = _write(folder, manifest, {spec.name: tensors[spec.name] for spec in manifest.tensors}, Form.WIDE)
    return path


def _equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_load_model_of_safetensors_loads_a_model_strictly(tmp_path: Path) -> None:
    model, other = _Model(tied=False), _Model(tied=False)

    missing, unexpected = load_model(other, _written(tmp_path / "g", model), strict=True)
    assert (list(missing), unexpected) == ([], [])
    assert _equal(model, other)


def test_tied_model_loads_strictly_by_torch_and_loosely_by_safetensors(tmp_path: Path) -> None:
    """`load_state_dict` needs every name of a tied tensor in the file, a strict `load_model` exactly one of them."""
    model, by_torch, by_safetensors = _Model(tied=True), _Model(tied=True), _Model(tied=True)
    path = _written(tmp_path / "g", model)
    by_torch.load_state_dict(load_file(path), strict=True)

    assert by_torch.head.weight is by_torch.embed.weight
    assert _equal(model, by_torch)
    with pytest.raises(RuntimeError, match=r'"head\.weight"'):
        load_model(by_safetensors, path, strict=True)
    missing, unexpected = load_model(by_safetensors, path, strict=False)
    assert (list(missing), unexpected) == ([], ["head.weight"])
    assert _equal(model, by_safetensors)


def test_thousand_tensors_are_one_sequential_write(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.full((i % 7 + 1,), float(i)) for i in range(1000)}
    manifest = manifest_of(tensors)
    path, _ = _write(tmp_path / "g", manifest, tensors, Form.WIDE)

    assert len(files_of(manifest, Form.WIDE)[0].spans) == 1
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())


def test_non_ascii_names_are_valid(tmp_path: Path) -> None:
    tensors = {"größe.\N{GREEK SMALL LETTER MU}": torch.randn(3), 'quote".\\': torch.randn(2)}
    path, _ = _write(tmp_path / "g", manifest_of(tensors), tensors, Form.WIDE)

    assert set(load_file(path)) == set(tensors)


def test_header_is_independent_of_the_values(tmp_path: Path) -> None:
    """Two versions of one run differ in their tensors' bytes alone, so their files have the same length and offsets."""
    manifest = manifest_of(_odd_tensors())
    first, _ = _write(tmp_path / "1", manifest, _odd_tensors(), Form.WIDE)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in _odd_tensors().items()}
    second, _ = _write(tmp_path / "2", manifest, other, Form.WIDE)
    length = len(files_of(manifest, Form.WIDE)[0].header)

    assert first.read_bytes()[:length] == second.read_bytes()[:length]
    assert first.read_bytes() != second.read_bytes()
    with safe_open(first, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_roles_of_tensors_do_not_change_the_file() -> None:
    specs = [TensorSpec("a", "F32", (3,), Role.PARAM, 0), TensorSpec("b", "F32", (3,), Role.BUFFER, 0)]
    others = [TensorSpec("a", "F32", (3,), Role.FROZEN, 0), TensorSpec("b", "F32", (3,), Role.STRUCTURAL, 0)]

    assert files_of(layout(specs), Form.WIDE) == files_of(layout(others), Form.WIDE)
