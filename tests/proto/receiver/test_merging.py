"""The manifests of several ranks become one, and every element is sent exactly once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.receiver.merging import Merged, Merging
from ema_proto.wire.boxes import Box, whole
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, from_json, layout


def merge(manifests: Sequence[Manifest]) -> Merged:
    merged = Merging(manifests).advance(1 << 40)
    assert merged is not None
    return merged


def _tensor(name: str, shape: tuple[int, ...], box: Box | None = None, role: Role = Role.PARAM) -> TensorSpec:
    return TensorSpec(name, "F32", shape, role, 0, (), box)


def _rows(name: str, rows: int, world: int, rank: int, columns: int = 3) -> TensorSpec:
    """The rows of a rank as `Shard(0)` of torch cuts them: equal blocks, the last ones shorter or empty."""
    block = -(-rows // world)
    low = min(rank * block, rows)
    return _tensor(name, (rows, columns), Box((low, 0), (min(block, rows - low), columns)))


def _refusal(*manifests: Manifest) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        merge(manifests)
    return caught.value


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    world=st.integers(1, 5),
    replicas=st.integers(1, 3),
    buffers=st.integers(0, 2),
)
def test_every_element_is_sent_by_one_rank(rows: list[int], world: int, replicas: int, buffers: int) -> None:
    whole_ones = [_tensor(f"b{index}", (2,), role=Role.BUFFER) for index in range(buffers)]
    shards = [
        layout([*(_rows(f"p{index}", n, world, rank % world) for index, n in enumerate(rows)), *whole_ones])
        for rank in range(world * replicas)
    ]
    merged = merge(shards)
    unsharded = layout([*(_tensor(f"p{index}", (n, 3)) for index, n in enumerate(rows)), *whole_ones])
    assert merged.manifest == unsharded
    assert merged.manifest.digest == unsharded.digest
    sent = Counter[str]()
    for shard, part in zip(shards, merged.parts, strict=True):
        assert part.nbytes == sum(tensor.nbytes for tensor in part.tensors)
        assert [shard.tensors[index].name for index in part.indices] == [tensor.name for tensor in part.tensors]
        for tensor in part.tensors:
            sent[tensor.name] += tensor.elements
    assert sent == Counter({tensor.name: math.prod(tensor.shape) for tensor in unsharded.tensors})


@given(st.data())
def test_pieces_of_any_size_give_the_same(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shards = [layout([_rows(f"p{index}", n, 2, rank % 2) for index, n in enumerate(rows)]) for rank in range(4)]
    merging, merged = Merging(shards), None
    while merged is None:
        merged = merging.advance(data.draw(st.integers(1, 5)))
    assert merged == merge(shards)


def test_boxes_that_one_rank_holds_count_in_what_it_sends() -> None:
    """Rank 0 alone holds a large tensor: rank 1 sends what both hold."""
    both = _tensor("both", (4,))
    merged = merge([layout([_tensor("large", (8,)), both]), layout([both])])
    assert [[tensor.name for tensor in part.tensors] for part in merged.parts] == [["large"], ["both"]]


def test_replicas_share_the_bytes_and_the_lowest_rank_sends_the_buffers() -> None:
    shard = layout([_tensor("a", (8,)), _tensor("b", (8,)), _tensor("mean", (4,), role=Role.BUFFER)])
    merged = merge([shard, shard])
    assert [[tensor.name for tensor in part.tensors] for part in merged.parts] == [["a", "mean"], ["b"]]


def test_rank_with_empty_boxes_only_sends_nothing() -> None:
    first, second = (layout([_rows("scale", 1, 2, rank)]) for rank in range(2))
    merged = merge([first, second])
    assert merged.parts[1].indices == ()
    assert merged.parts[1].nbytes == 0


def test_stages_of_a_pipeline_are_joined_in_the_order_of_ranks() -> None:
    merged = merge(
        [layout([_tensor("l0", (2,)), _tensor("l1", (2,))]), layout([_tensor("l2", (2,)), _tensor("n", (1,))])]
    )
    assert [tensor.name for tensor in merged.manifest.tensors] == ["l0", "l1", "l2", "n"]


def test_tensor_that_only_a_later_rank_holds_keeps_its_place() -> None:
    merged = merge([layout([_tensor("a", (2,)), _tensor("c", (2,))]), layout([_tensor("b", (2,)), _tensor("c", (2,))])])
    assert [tensor.name for tensor in merged.manifest.tensors] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (TensorSpec("w", "BF16", (4,), Role.PARAM, 0), "dtype F32 on rank 0 and BF16 on rank 1"),
        (TensorSpec("w", "F32", (5,), Role.PARAM, 0), "shape [4] on rank 0 and [5] on rank 1"),
        (TensorSpec("w", "F32", (4,), Role.FROZEN, 0), "role param on rank 0 and frozen on rank 1"),
        (TensorSpec("w", "F32", (4,), Role.PARAM, 0, ("v",)), "aliases [] on rank 0 and ['v'] on rank 1"),
    ],
)
def test_ranks_that_describe_a_tensor_differently_are_refused(other: TensorSpec, text: str) -> None:
    refusal = _refusal(layout([_tensor("w", (4,))]), layout([other]))
    assert refusal.code is RejectCode.RANKS_DIFFER
    assert refusal.text == f"tensor 'w' has {text}"


def test_missing_rows_are_named() -> None:
    refusal = _refusal(layout([_rows("w", 6, 3, 0)]), layout([_rows("w", 6, 3, 2)]))
    assert refusal.code is RejectCode.NOT_TILED
    assert refusal.text == "tensor 'w' [6, 3]: [2:4, 0:3] is held by no rank"


def test_rows_that_torch_computes_wrongly_for_an_uneven_mesh_are_refused() -> None:
    """The box of one rank has another rank's rows: torch's offsets for 9 rows on a mesh of 4 by 2."""
    boxes = [Box((0, 0), (5, 3)), Box((5, 0), (3, 3)), Box((7, 0), (1, 3)), Box((8, 0), (1, 3))]
    refusal = _refusal(*(layout([_tensor("w", (9, 3), box)]) for box in boxes))
    assert refusal.code is RejectCode.NOT_TILED
    assert "overlap" in refusal.text


def test_tensor_tied_on_one_rank_only_is_refused() -> None:
    tied = layout([TensorSpec("a", "F32", (2,), Role.PARAM, 0, ("b",))])
    assert _refusal(tied, layout([_tensor("b", (2,))])).code is RejectCode.MANIFEST_INVALID


def test_boxes_travel_in_a_manifest() -> None:
    manifest = layout([_rows("w", 6, 3, 2), _tensor("b", (3,))])
    assert manifest.nbytes == (2 * 3 + 3) * 4
    assert from_json(manifest.to_json()) == manifest
    assert "box" not in manifest.to_json()[1]


@pytest.mark.parametrize(
    "change",
    [
        {"box": {"offsets": [0], "sizes": [2, 3]}},
        {"box": {"offsets": [5, 0], "sizes": [2, 3]}},
        {"box": {"offsets": [-1, 0], "sizes": [2, 3]}},
        {"box": {"offsets": [0, 0], "sizes": [True, 3]}},
        {"box": [0, 0]},
        {"range": [0, 4]},
    ],
)
def test_impossible_boxes_are_refused(change: dict[str, object]) -> None:
    entry = layout([_tensor("w", (6, 3))]).to_json()[0] | change
    with pytest.raises(RemoteProtocolError) as caught:
        from_json([entry])
    assert caught.value.code is RejectCode.MANIFEST_INVALID


def test_whole_tensor_given_as_a_box_is_the_same_tensor() -> None:
    boxed = layout([_tensor("w", (4, 3), whole((4, 3)))])
    assert merge([boxed]).manifest == layout([_tensor("w", (4, 3))])
