"""The memory of slots, as the kernel sees it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from trainer_client.staging.slots import make_slots

_NBYTES = 8 << 20


def _flags_at(address: int) -> frozenset[str]:
    """The kernel's flags of the mapping that holds an address."""
    begin = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(each, 16) for each in found.groups())
        if line.startswith("VmFlags:") and begin <= address < end:
            return frozenset(line.split()[1:])
    raise LookupError(hex(address))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slots_ask_for_huge_pages_and_are_not_copied_to_forked_children() -> None:
    slots = make_slots(_NBYTES, 2)

    for slot in slots:
        assert _flags_at(slot.tensor.data_ptr()) >= {"hg", "dc"}


def test_slots_have_their_exact_size_and_begin_as_zeros() -> None:
    (slot,) = make_slots(12_345, 1)

    assert (slot.tensor.nbytes, len(slot.view)) == (12_345, 12_345)
    assert not slot.tensor.any()


def test_tensor_and_view_of_a_slot_are_the_same_memory() -> None:
    (slot,) = make_slots(100, 1)

    slot.tensor[7] = 42

    assert slot.view[7] == 42
