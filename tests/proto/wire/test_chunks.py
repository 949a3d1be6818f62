"""Cutting a buffer, and knowing what has arrived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.wire.chunks import Coverage, count_chunks


def _cut(nbytes: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk; only the last may be short."""
    return [(offset, min(chunk_bytes, nbytes - offset)) for offset in range(0, nbytes, chunk_bytes)]


@given(nbytes=st.integers(1, 5000), chunk_bytes=st.integers(1, 700))
def test_chunk_count_includes_a_short_last_chunk(nbytes: int, chunk_bytes: int) -> None:
    assert count_chunks(nbytes, chunk_bytes) == len(_cut(nbytes, chunk_bytes))


@given(st.data(), st.integers(1, 3000), st.integers(50, 700))
def test_coverage_is_complete_in_any_order_with_repeats(data: st.DataObject, nbytes: int, chunk_bytes: int) -> None:
    chunks = data.draw(st.permutations(_cut(nbytes, chunk_bytes)))
    coverage = Coverage(nbytes, chunk_bytes)
    for seen, (offset, length) in enumerate(chunks):
        assert coverage.missing == len(chunks) - seen
        assert not coverage.holds(offset, length)
        coverage.add(offset)
        coverage.add(offset)
        assert coverage.holds(offset, length)

    assert coverage.missing == 0


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

    assert count_chunks(nbytes, chunk_bytes) == 513
    coverage = Coverage(nbytes, chunk_bytes)
    assert not coverage.holds(1 << 33, 5)
