"""The packet by which slots in shared memory are passed: its bytes, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import SHARED_SLOTS_MAX
from ema_proto.wire.slot_offer import SLOT_OFFER_BYTES, SlotOffer

SESSION = bytes(range(1, 17))
GOLDEN = "454d4153 01 00 0200 0102030405060708090a0b0c0d0e0f10 00e1f50500000000"  # as the table of SPEC.md section 17


def test_golden_packet_reads_and_writes_identically() -> None:
    packet, offer = bytes.fromhex(GOLDEN), SlotOffer(SESSION, 2, 100_000_000)

    assert offer.encode() == packet
    assert SlotOffer.decode(packet) == offer


@given(st.binary(max_size=2 * SLOT_OFFER_BYTES).filter(lambda packet: not packet.startswith(b"EMAS\x01")))
def test_any_other_packet_is_refused(packet: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        SlotOffer.decode(packet)

    assert refused.value.code is RejectCode.BAD_FRAME


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (bytes.fromhex(GOLDEN)[1:], "31 bytes"),
        (b"EMAT" + bytes.fromhex(GOLDEN)[4:], "starts with"),
        (b"EMAS\x02" + bytes.fromhex(GOLDEN)[5:], "version 1"),
        (SlotOffer(SESSION, SHARED_SLOTS_MAX + 1, 1).encode(), "9 slots"),
        (SlotOffer(SESSION, 0, 1).encode(), "0 slots"),
        (SlotOffer(SESSION, 1, 0).encode(), "0 bytes"),
    ],
)
def test_refusal_says_what_is_wrong(wrong: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        SlotOffer.decode(wrong)
