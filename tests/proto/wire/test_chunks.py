"""Cutting a buffer, and knowing what has arrived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.wire.chunks import Coverage, count_chunks, cut


@given(nbytes=st.integers(1, 5000), chunk_bytes=st.integers(1, 700))
def test_chunks_are_contiguous_and_only_the_last_is_short(nbytes: int, chunk_bytes: int) -> None:
    chunks = list(cut(nbytes, chunk_bytes))

    assert len(chunks) == count_chunks(nbytes, chunk_bytes)
    assert sum(length for _, length in chunks) == nbytes
    assert [offset for offset, _ in chunks] == list(range(0, nbytes, chunk_bytes))
    assert all(length == chunk_bytes for _, length in chunks[:-1])


@given(st.data(), st.integers(1, 3000), st.integers(50, 700))
def test_coverage_is_complete_in_any_order_with_repeats(data: st.DataObject, nbytes: int, chunk_bytes: int) -> None:
    chunks = data.draw(st.permutations(list(cut(nbytes, chunk_bytes))))
    coverage = Coverage(nbytes, chunk_bytes)
    for seen, (offset, length) in enumerate(chunks):
        assert coverage.missing == len(chunks) - seen
        assert not coverage.holds(offset, length)
        coverage.add(offset)
        coverage.add(offset)
        assert coverage.holds(offset, length)

    assert coverage.missing == 0
    assert coverage.first_missing() is None


def test_first_missing_byte_is_known() -> None:
    coverage = Coverage(250, 100)
    coverage.add(0)
    coverage.add(200)

    assert coverage.first_missing() == 100


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 99), (0, 99), (0, 101), (200, 100), (250, 1), (300, 100), (10**19, 1)]
)
def test_range_that_is_not_a_chunk_is_refused(offset: int, length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"bytes {offset} to") as caught:
        Coverage(250, 100).holds(offset, length)
    assert caught.value.code is RejectCode.BAD_CHUNK


def test_snapshot_over_4_gib_is_cut_at_exact_offsets() -> None:
    nbytes, chunk_bytes = (1 << 33) + 5, 16 << 20

    assert list(cut(nbytes, chunk_bytes))[-1] == (1 << 33, 5)
    coverage = Coverage(nbytes, chunk_bytes)
    assert not coverage.holds(1 << 33, 5)
