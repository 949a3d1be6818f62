"""Boxes: what tiles a tensor, and how a flat range of a box is cut; checked element by element."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.wire.boxes import Box, lies_within, pieces, tiling_fault, whole

_SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


def _elements(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(low, low + n) for low, n in zip(box.offsets, box.sizes, strict=True))))


def _span_of(ends: tuple[int, int]) -> tuple[int, int]:
    return ends[0], ends[1] - ends[0]


def _span(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Offset and size of a part of a dimension that is not empty."""
    ends = st.tuples(st.integers(0, size - 1), st.integers(1, size))
    return ends.filter(lambda each: each[0] < each[1]).map(_span_of)


def _box(spans: tuple[tuple[int, int], ...]) -> Box:
    return Box(tuple(low for low, _ in spans), tuple(size for _, size in spans))


@st.composite
def _cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Cut a tensor along one dimension after another, as a mesh does, unevenly; empty boxes are left out."""
    boxes = [whole(shape)]
    for dimension in draw(st.permutations(range(len(shape)))):
        cut: list[Box] = []
        for box in boxes:
            marks = sorted(draw(st.lists(st.integers(0, box.sizes[dimension]), max_size=3)))
            for low, high in itertools.pairwise([0, *marks, box.sizes[dimension]]):
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[dimension], sizes[dimension] = box.offsets[dimension] + low, high - low
                cut.append(Box(tuple(offsets), tuple(sizes)))
        boxes = [box for box in cut if box.elements]
    return boxes


@given(st.data(), _SHAPES)
def test_boxes_cut_dimension_by_dimension_tile_the_tensor(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(_cuts(shape))
    assert tiling_fault(shape, boxes) is None


@given(st.data(), _SHAPES.filter(lambda shape: math.prod(shape) > 1))
def test_removed_box_is_reported_as_missing(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(_cuts(shape))
    gone = data.draw(st.sampled_from(boxes))
    fault = tiling_fault(shape, [box for box in boxes if box != gone])
    assert fault is not None


@given(st.data(), _SHAPES)
def test_fault_is_found_exactly_where_elements_are_not_held_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = list(dict.fromkeys(data.draw(_cuts(shape))))
    extra = data.draw(st.lists(st.tuples(*map(_span, shape)).map(_box), max_size=2))
    boxes = list(dict.fromkeys([*boxes, *extra]))
    held = [element for box in boxes for element in _elements(box)]
    is_exact = len(held) == len(set(held)) == math.prod(shape)
    assert (tiling_fault(shape, boxes) is None) == is_exact


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([], "[0:4, 0:2] is held by no rank"),
        ([Box((0, 0), (3, 2))], "[3:4, 0:2] is held by no rank"),
        ([Box((1, 0), (3, 2))], "[0:1, 0:2] is held by no rank"),
        ([Box((0, 0), (3, 2)), Box((2, 0), (2, 2))], "[0:3, 0:2] and [2:4, 0:2] overlap"),
        ([Box((0, 0), (4, 2)), Box((0, 0), (2, 2))], "[0:2, 0:2] and [0:4, 0:2] overlap"),
    ],
)
def test_fault_names_the_place(boxes: list[Box], fault: str) -> None:
    assert tiling_fault((4, 2), boxes) == fault


def test_empty_tensor_needs_no_box() -> None:
    assert tiling_fault((3, 0), []) is None


@given(st.data(), _SHAPES)
def test_pieces_cover_the_flat_range_in_order(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    total = math.prod(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    order = list(itertools.product(*(range(n) for n in sizes)))
    found = [element for piece in pieces(sizes, start, stop) for element in sorted(_elements(piece))]
    assert found == order[start:stop]
    assert len(list(pieces(sizes, start, stop))) <= 2 * max(len(sizes), 1) - 1


def test_box_outside_the_tensor_does_not_lie_within() -> None:
    assert lies_within(Box((1, 0), (2, 4)), (3, 4))
    assert not lies_within(Box((2, 0), (2, 4)), (3, 4))
    assert not lies_within(Box((-1, 0), (1, 4)), (3, 4))
    assert not lies_within(Box((0,), (3,)), (3, 4))
