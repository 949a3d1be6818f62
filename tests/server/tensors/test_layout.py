"""Every element of a snapshot is in exactly one segment, aligned, for any tensors; nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_server.tensors.file_plan import Span, files_of
from ema_server.tensors.layout import Form, Segment, cut, held_dtype, held_nbytes, places, segments, take_out
from support.server_core import all_segments


def _spec(name: str, dtype: str, shape: tuple[int, ...], role: Role = Role.PARAM, *aliases: str) -> TensorSpec:
    return TensorSpec(name, dtype, shape, role, 0, aliases)


_TENSORS = st.lists(
    st.tuples(
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from(list(Role)),
        st.booleans(),
    ),
    min_size=1,
    max_size=20,
).filter(lambda tensors: any(math.prod(shape) for _, shape, _, _ in tensors))


def _manifest(tensors: list[tuple[str, tuple[int, ...], Role, bool]]) -> Manifest:
    return layout(
        _spec(f"t{i}", dtype, shape, role, *([f"t{i}.tied"] if tied else []))
        for i, (dtype, shape, role, tied) in enumerate(tensors)
    )


@given(_TENSORS, st.integers(1, 7), st.sampled_from(list(Form)))
def test_blocks_cover_every_form_once_and_aligned(
    tensors: list[tuple[str, tuple[int, ...], Role, bool]], block_elements: int, form: Form
) -> None:
    manifest = _manifest(tensors)
    covered: list[tuple[int, int]] = []
    for block in cut(all_segments(manifest), block_elements):
        begin, item = block.offset(form), ITEM_BYTES[held_dtype(form, block.dtype)]
        assert 0 < block.count <= block_elements
        assert begin % item == 0
        covered.append((begin, begin + block.count * item))

    covered.sort()
    assert [begin for begin, _ in covered] == [0, *(end for _, end in covered[:-1])]
    assert covered[-1][1] == held_nbytes(manifest, form)
    assert held_nbytes(manifest, Form.WIRE) == manifest.nbytes


@given(_TENSORS, st.sampled_from(list(Form)))
def test_each_tensor_is_in_a_segment_with_the_mask_of_its_role_and_dtype(
    tensors: list[tuple[str, tuple[int, ...], Role, bool]], form: Form
) -> None:
    manifest = _manifest(tensors)
    found = all_segments(manifest)
    for place in places(manifest, form):
        tensor = place.tensor
        if tensor.elements:
            (home,) = [s for s in found if s.offset(form) <= place.offset < s.offset(form) + _held_bytes(s, form)]
            assert home.dtype == tensor.dtype
            assert bool(home.averaged) == (tensor.dtype in FLOATS and tensor.role is not Role.STRUCTURAL)


@given(_TENSORS, st.sampled_from(list(Form)))
def test_files_of_an_average_hold_every_byte_once_and_every_name(
    tensors: list[tuple[str, tuple[int, ...], Role, bool]], form: Form
) -> None:
    manifest = _manifest(tensors)
    model, *state = files_of(manifest, form)
    written = [(span.file_offset, span.file_offset + _stored_bytes(span)) for span in model.spans]
    written += [(copy.target, copy.target + copy.nbytes) for copy in model.copies]
    position = len(model.header)
    for begin, end in sorted(written):
        assert begin == position
        position = end

    assert position == model.nbytes
    assert sum(span.end - span.begin for span in model.spans) == held_nbytes(manifest, form)
    doubles = any(place.dtype == "F64" for place in places(manifest, form))
    assert bool(state) == (form is not Form.WIRE and doubles)


def test_adjacent_tensors_of_one_mask_are_one_segment() -> None:
    manifest = layout(_spec(f"layer{i}", "F32", (3, i + 1)) for i in range(1000))

    assert all_segments(manifest) == (Segment("F32", -1, manifest.nbytes // 4, 0, 0, 0),)


def test_tensor_with_another_mask_splits_the_segment() -> None:
    manifest = layout([_spec("a", "F32", (2,)), _spec("b", "F32", (3,), Role.BUFFER), _spec("c", "F32", (4,))])

    found = segments(manifest, lambda tensor: 0b01 if tensor.role is Role.BUFFER else 0b11)

    assert [(s.averaged, s.count) for s in found] == [(0b11, 2), (0b01, 3), (0b11, 4)]


@given(st.lists(st.sampled_from(["F32", "F64", "BF16", "I64"]), min_size=1, max_size=8), st.data())
def test_take_out_separates_the_elements_of_some_tensors(dtypes: list[str], data: st.DataObject) -> None:
    tensors = [
        _spec(str(i), dtype, (data.draw(st.integers(0, 3)),), data.draw(st.sampled_from([Role.PARAM, Role.STRUCTURAL])))
        for i, dtype in enumerate(dtypes)
    ]
    manifest = layout([*tensors, _spec("last", "F32", (2,))])
    names = data.draw(st.sets(st.sampled_from([tensor.name for tensor in manifest.tensors])))
    chosen = [tensor for tensor in manifest.tensors if tensor.name in names]

    rest, taken = take_out(all_segments(manifest), chosen)

    def elements(found: Iterable[Segment]) -> list[tuple[int, int, int, str]]:
        return sorted((one.wire_offset, one.wide_offset, one.exact_offset, one.dtype) for one in cut(found, 1))

    assert elements([*rest, *taken]) == elements(all_segments(manifest))
    assert {one.averaged for one in taken} <= {-1}
    assert [(one.wire_offset, one.count) for one in taken] == sorted(
        (tensor.offset, tensor.elements) for tensor in chosen if tensor.elements
    )


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_offsets_beyond_2_to_the_31_bytes_are_right(dtype: str) -> None:
    """40,000,000,000 elements: offsets, blocks and file positions beyond 32 bits, and not a byte of them allocated."""
    count = 40_000_000_000
    manifest = layout([_spec("huge", dtype, (count,)), _spec("after", dtype, (3,)), _spec("flags", "BOOL", (5,))])
    item, wide_item = ITEM_BYTES[dtype], 8 if dtype == "F64" else 4
    runs = all_segments(manifest)
    blocks = cut(runs, 1 << 30)

    assert manifest.nbytes == (count + 3) * item + 5
    assert held_nbytes(manifest, Form.WIDE) == (count + 3) * wide_item + 5
    assert runs[-1] == Segment("BOOL", 0, 5, (count + 3) * item, (count + 3) * wide_item, (count + 3) * 8)
    last = [block for block in blocks if block.dtype == dtype][-1]
    assert last.wire_offset + last.count * item == (count + 3) * item
    for form in Form:
        model = files_of(manifest, form)[0]
        stored = item if form is Form.WIRE else 4
        assert model.nbytes == len(model.header) + (count + 3) * stored + 5
        assert model.spans[-1].file_offset + _stored_bytes(model.spans[-1]) == model.nbytes


def _held_bytes(segment: Segment, form: Form) -> int:
    return segment.count * ITEM_BYTES[held_dtype(form, segment.dtype)]


def _stored_bytes(span: Span) -> int:

    return (span.end - span.begin) // (2 if span.narrows else 1)
