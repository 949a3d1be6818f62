"""What a snapshot may look like, and where its bytes lie."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, from_json, layout


def spec(name: str = "w", dtype: str = "F32", shape: tuple[int, ...] = (2,), role: Role = Role.PARAM) -> TensorSpec:
    return TensorSpec(name, dtype, shape, role, 0)


GOOD: dict[str, Any] = {"name": "w", "dtype": "F32", "shape": [2], "role": "param", "offset": 0}


def refusal(value: object) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        from_json(value)
    assert caught.value.code is RejectCode.MANIFEST_INVALID
    assert len(caught.value.text) < 1500
    return caught.value.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": 3}, "tensor 3 has dtype"),
        ({"name": ""}, "empty, unprintable or over 1024"),
        ({"name": "a\nb"}, "empty, unprintable or over 1024"),
        ({"name": "x" * 1025}, "empty, unprintable or over 1024"),
        ({"name": "\ud800"}, "empty, unprintable or over 1024"),
        ({"name": "__metadata__"}, "reserved by the safetensors format"),
        ({"dtype": None}, "dtype null"),
        ({"dtype": "F8_E4M3"}, "has dtype 'F8_E4M3'; known are F64, I64"),
        ({"shape": None}, "shape null, not a list of integers"),
        ({"shape": [True]}, "not a list of integers"),
        ({"shape": [1.0]}, "not a list of integers"),
        ({"shape": [-1]}, "none negative"),
        ({"shape": [1] * 65}, "65 dimensions"),
        ({"shape": [10**4000]}, "outside the address space"),
        ({"shape": [0, 2**62, 2**62]}, "outside the address space"),
        ({"shape": [[]]}, "not a list of integers"),
        ({"role": "weight"}, 'role "weight"; known are param, frozen, buffer, structural'),
        ({"role": ["param"]}, "a list of 1 items"),
        ({"offset": None}, "offset null, not an integer"),
        ({"offset": -1}, "outside the address space"),
        ({"offset": 4}, "is at byte 4, the layout puts it at 0"),
        ({"aliases": "v"}, 'aliases "v", not a list of names'),
        ({"aliases": ["w"]}, "name 'w' appears twice"),
        ({"aliases": ["a", "a"]}, "name 'a' appears twice"),
        ({"shape": [0]}, "there is nothing to average"),
    ],
)
def test_invalid_tensor_is_refused_with_a_description(change: dict[str, Any], text: str) -> None:
    assert text in refusal([GOOD | change])


@pytest.mark.parametrize("value", [None, {}, "w", [None], [["w"]], []], ids=repr)
def test_manifest_is_a_list_of_tensors(value: object) -> None:
    assert refusal(value)


def test_deeply_nested_values_do_not_overflow_the_error_text() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    for key in GOOD:
        assert refusal([GOOD | {key: nested}])
    assert refusal([nested])


def test_duplicate_tensor_names_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="'w' appears twice"):
        layout([spec(), spec()])


def test_more_tensors_than_the_limit_are_refused() -> None:
    assert "1 to 100000 tensors, this one 100001" in refusal([GOOD] * 100_001)


def test_tensors_are_ordered_by_item_size_dtype_and_order() -> None:
    manifest = layout(
        [
            spec("bool", "BOOL", (3,)),
            spec("half", "BF16", (3,)),
            spec("second", "F32", (1,)),
            spec("ints", "I32", (1,)),
            spec("first", "F32", ()),
            spec("none", "F64", (0, 7)),
            spec("long", "I64", (1,)),
        ]
    )

    order = ["none", "long", "second", "first", "ints", "half", "bool"]
    assert [tensor.name for tensor in manifest.by_offset] == order
    assert [tensor.offset for tensor in manifest.by_offset] == [0, 0, 8, 12, 16, 20, 26]
    assert manifest.nbytes == 29


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(Role))
        ),
        min_size=1,
        max_size=12,
    )
)
def test_layout_is_gapless_aligned_and_survives_json(
    tensors: list[tuple[str, list[int], Role]],
) -> None:
    given_specs = [spec("x", "U8", (1,))]
    given_specs += [spec(f"t{i}", dtype, tuple(shape), role) for i, (dtype, shape, role) in enumerate(tensors)]
    manifest = layout(given_specs)
    position = 0
    for tensor in manifest.by_offset:
        assert tensor.offset == position
        assert tensor.offset % ITEM_BYTES[tensor.dtype] == 0
        position = tensor.end

    assert position == manifest.nbytes
    assert [tensor.name for tensor in manifest.tensors] == [tensor.name for tensor in given_specs]
    assert from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("elements", [2**31 + 1, 2**40 + 1])
def test_offsets_after_a_huge_tensor_are_exact(elements: int) -> None:
    manifest = layout([spec("huge", "F32", (elements,)), spec("long", "I64", (1,)), spec("after", "BF16", (3,))])
    offsets = {tensor.name: tensor.offset for tensor in manifest.tensors}

    assert offsets == {"huge": 8, "long": 0, "after": 8 + 4 * elements}
    assert manifest.nbytes == 14 + 4 * elements
    assert from_json(manifest.to_json()).nbytes == manifest.nbytes


def seconds_for(tensors: int) -> float:
    specs = [spec(f"layers.{number}.weight", "F32", (4, 4)) for number in range(tensors)]
    started = time.process_time()
    manifest = layout(specs)
    again = from_json(manifest.to_json())
    assert again.digest == manifest.digest
    assert manifest.first_difference(again) is None
    return time.process_time() - started


@pytest.mark.slow
def test_work_for_30_000_tensors_is_linear() -> None:
    few = max(seconds_for(3_000), 0.006)

    assert seconds_for(30_000) < 40 * few, "ten times the tensors; the square would be a hundred times the work"


def test_digest_covers_everything_but_roles() -> None:
    base = layout([spec("a"), spec("b")])
    frozen = layout([spec("a", role=Role.FROZEN), spec("b", role=Role.BUFFER)])
    others = [
        layout([spec("a"), spec("c")]),
        layout([spec("a"), spec("b", "I32")]),
        layout([spec("a"), spec("b", shape=(2, 1))]),
        layout([spec("b"), spec("a")]),
        layout([spec("a"), replace(spec("b"), aliases=("c",))]),
        layout([spec("a")]),
    ]

    assert frozen.digest == base.digest
    assert base.first_difference(frozen) is None
    assert len({manifest.digest for manifest in [base, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (layout([spec("a"), spec("c")]), "tensor 'c' is new"),
        (layout([spec("a"), spec("b", "BF16")]), "tensor 'b' is BF16[2], it was F32[2]"),
        (layout([spec("a"), spec("b", shape=(4, 5))]), "tensor 'b' is F32[4, 5], it was F32[2]"),
        (layout([spec("a")]), "tensor 'b' is gone"),
        (layout([spec("b"), spec("a")]), "the tensors are in another order"),
        (
            layout([spec("a"), replace(spec("b"), aliases=("c", "d", "e", "f"))]),
            "tensor 'b' is tied to 'c', 'd', 'e' and 1 more, it was tied to nothing",
        ),
    ],
)
def test_first_difference_is_described(other: Manifest, text: str) -> None:
    assert layout([spec("a"), spec("b")]).first_difference(other) == text


@pytest.mark.parametrize("number", [2, 999, 1000, 1001, 2503])
def test_digest_is_that_of_one_list_of_all_tensors(number: int) -> None:
    tensors = (
        TensorSpec(f"t.{index}", "F32", (index % 5, 3), Role.PARAM, 0, (f"tied.{index}",) if index % 7 == 0 else ())
        for index in range(number)
    )
    manifest = layout(tensors)
    lines = [[t.name, t.dtype, list(t.shape), t.offset, list(t.aliases)] for t in manifest.tensors]

    assert manifest.digest == hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
