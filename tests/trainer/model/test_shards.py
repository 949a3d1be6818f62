"""What a rank holds of a sharded tensor. Shards of several ranks are tested in tests/system/test_sharded.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ema_proto.wire.boxes import Box
from trainer_client.errors import GatheredError, PlanError
from trainer_client.model.plan import Plan
from trainer_client.model.shards import as_module, box_of, holds_part, local_of
from trainer_client.model.sources import storage_address, version_of

tensors = pytest.importorskip("torch.distributed.tensor", reason="torch 2.4 has DTensor under a private name")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    if not hasattr(tensors, "distribute_module"):
        pytest.skip("torch 2.4 has DTensor under a private name")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class _Chunk:
    def __init__(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.offsets, self.sizes = offsets, sizes


class DTensor:
    """Looks like a DTensor of several ranks."""

    def __init__(
        self,
        shape: tuple[int, ...],
        local: Tensor,
        *chunks: _Chunk,
        placements: tuple[object, ...] = (),
        device_mesh: object = "mesh",
    ) -> None:
        self.shape, self.placements, self.device_mesh = torch.Size(shape), placements, device_mesh
        self._local, self._chunks = local, list(chunks)

    def dim(self) -> int:
        return len(self.shape)

    def to_local(self) -> Tensor:
        return self._local

    def __create_chunk_list__(self) -> list[_Chunk]:
        return self._chunks


class Partial:
    pass


class Shard:
    def __init__(self, dim: int) -> None:
        self.dim = dim


class _StridedShard(Shard):
    def __init__(self, dim: int, split_factor: int) -> None:
        super().__init__(dim)
        self.split_factor = split_factor


class _Mesh:
    def __init__(self, sizes: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self._sizes, self._coordinate = sizes, coordinate

    def size(self, dimension: int) -> int:
        return self._sizes[dimension]

    def get_coordinate(self) -> list[int]:
        return list(self._coordinate)


def _box(*arguments: Any, **more: Any) -> Box | None:
    return box_of("w", DTensor(*arguments, **more))  # type: ignore[arg-type]


def test_box_is_that_of_the_local_rows() -> None:
    assert _box((5, 2), torch.zeros(2, 2), _Chunk((3, 0), (2, 2))) == Box((3, 0), (2, 2))


def test_box_of_all_is_the_whole_tensor() -> None:
    assert _box((5, 2), torch.zeros(5, 2), _Chunk((0, 0), (5, 2))) is None


def test_rank_may_hold_nothing() -> None:
    assert _box((1, 2), torch.zeros(0, 2), _Chunk((1, 0), (0, 2))) == Box((1, 0), (0, 2))


@pytest.mark.parametrize(
    "chunks", [[], [_Chunk((0, 0), (3, 2))], [_Chunk((4, 0), (2, 2))], [_Chunk((0, 0), (1, 2)), _Chunk((2, 0), (1, 2))]]
)
def test_box_that_is_not_the_local_memory_is_refused_by_name(chunks: list[_Chunk]) -> None:
    with pytest.raises(PlanError, match=r"tensor 'w' is sharded .* local shape of \[2, 2\]"):
        _box((5, 2), torch.zeros(2, 2), *chunks)


def _nth(rows: Tensor, parts: int, index: int) -> Tensor:
    """One of the parts that `torch.chunk` cuts; empty if it cuts fewer."""
    chunks = torch.chunk(rows, parts) if len(rows) else (rows,)
    return chunks[index] if index < len(chunks) else rows[:0]


@pytest.mark.parametrize(("data", "tensor"), list(itertools.product((2, 3, 4, 8), (2, 3, 4))))
def test_box_of_fsdp_with_tensor_parallelism_is_that_of_the_local_rows_for_all_sizes(data: int, tensor: int) -> None:
    placements = (_StridedShard(0, tensor), Shard(0))
    for rows, one, other in itertools.product(range(1, 41), range(data), range(tensor)):
        held = _nth(_nth(torch.arange(rows), tensor, other), data, one)
        mesh = _Mesh((data, tensor), (one, other))
        wrong = _Chunk((0, 0), (rows + 1, 2))
        box = _box((rows, 2), torch.zeros(len(held), 2), wrong, placements=placements, device_mesh=mesh)
        found = Box((0, 0), (rows, 2)) if box is None else box
        assert found.sizes == (len(held), 2)
        assert found.offsets[0] == held[0] if len(held) else found.offsets[0] <= rows


@pytest.mark.parametrize(
    "placements", [(Shard(0), _StridedShard(0, 1)), (_StridedShard(0, 2), Shard(1)), (_StridedShard(0, 4), Shard(0))]
)
def test_box_of_an_unknown_order_of_shards_is_that_of_torch(placements: tuple[object, ...]) -> None:
    mesh = _Mesh((2, 2), (1, 1))
    chunk = _Chunk((2, 1), (1, 1))
    assert _box((4, 2), torch.zeros(1, 1), chunk, placements=placements, device_mesh=mesh) == Box((2, 1), (1, 1))


def test_shard_that_an_old_torch_does_not_describe_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DTensor, "__create_chunk_list__")
    assert _box((2, 2), torch.zeros(2, 2)) is None
    with pytest.raises(PlanError, match=r"tensor 'w' is sharded .* for which torch .* reports nothing"):
        _box((5, 2), torch.zeros(2, 2))


def test_partial_sums_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="tensor 'w' holds partial sums"):
        _box((5, 2), torch.zeros(5, 2), _Chunk((0, 0), (5, 2)), placements=(Partial(),))


def test_writes_to_a_sharded_parameter_are_seen_though_its_local_tensor_does_not_count_them(mesh: Any) -> None:
    model = nn.Linear(2, 2)
    tensors.distribute_module(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [version_of(each) for each in model.parameters()]
    before_local = [version_of(local_of(each)) for each in model.parameters()]
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert all(version_of(each) > was for each, was in zip(model.parameters(), before, strict=True))
    assert [version_of(local_of(each)) for each in model.parameters()] == before_local


def test_sharded_parameter_has_the_address_of_its_local_memory(mesh: Any) -> None:
    model = nn.Linear(2, 2)
    tensors.distribute_module(model, mesh)
    assert storage_address(model.weight) == local_of(model.weight).untyped_storage().data_ptr()


def test_tied_sharded_parameters_are_one_tensor(mesh: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tensors.distribute_module(model, mesh)
    model[1].weight = model[0].weight
    assert [tensor.names for tensor in Plan.of(model).manifest.tensors] == [("0.weight", "1.weight")]


def test_stages_of_a_pipeline_keep_their_names() -> None:
    whole = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    first, last = nn.ModuleDict({"a": whole["a"]}), nn.ModuleDict({"c": whole["c"]})
    stages = as_module([first, last])
    assert holds_part(stages)
    assert [tensor.name for tensor in Plan.of(stages).manifest.tensors] == ["a.weight", "a.bias", "c.weight", "c.bias"]


def test_stages_with_equal_names_are_refused() -> None:
    with pytest.raises(PlanError, match=r"two tensors are named 'weight'"):
        Plan.of(as_module([nn.Linear(2, 2), nn.Linear(2, 2)]))


def _first_row(name: str, tensor: Tensor) -> Box:
    return Box((0,) * tensor.dim(), (1, *tensor.shape[1:]))


def test_gathered_parameter_is_not_taken_for_a_change_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 4)
    monkeypatch.setattr(
        "trainer_client.model.plan.box_of",
        lambda name, tensor: Box((0, *(0 for _ in tensor.shape[1:])), (1, *tensor.shape[1:])),
    )
    plan = Plan.of(model)
    with pytest.raises(GatheredError, match="weight"):
        plan.tensors()


def test_plan_of_a_part_has_some_of_the_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    part = Plan.of(model).part([1, 3])
    assert [(tensor.name, tensor.offset) for tensor in part.manifest.tensors] == [("0.bias", 0), ("1.bias", 8)]
    assert [tensor.shape for tensor in part.renewed(model).tensors()] == [(2,), (3,)]
    model[1] = nn.Linear(2, 3)
    renewed = part.renewed(model)
    assert renewed.tensors()[1] is model[1].bias
    assert renewed.manifest == part.manifest
