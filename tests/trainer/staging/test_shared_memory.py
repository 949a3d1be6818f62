"""Memory that two processes map: sealed, returned when no process has it, and absent from forked children."""

from __future__ import annotations

import gc
import mmap
import os
import sys

import pytest
import torch

from support.memory_files import slots_of
from trainer_client.staging.shared_memory import map_shared
from trainer_client.staging.slots import make_slots

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def test_slots_are_zeroed_and_the_file_holds_what_is_written() -> None:
    slots = make_slots(10_000, 2, shared=True)

    assert [slot.index for slot in slots] == [0, 1]
    for slot in slots:
        assert not slot.tensor.any()
        assert slot.descriptor is not None
        slot.tensor[9_999] = 7 + slot.index
        assert slot.view[9_999] == 7 + slot.index
        with mmap.mmap(slot.descriptor, 10_000) as other:
            assert other[9_999] == 7 + slot.index


def test_size_of_the_memory_cannot_be_changed() -> None:
    memory = map_shared(5_000)

    for size in (0, 4_999, 5_001):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.descriptor, size)


def test_memory_stays_as_long_as_a_view_and_is_returned_with_the_last_one() -> None:
    gc.collect()
    before = slots_of()
    (slot,) = make_slots(8_192, 1, shared=True)
    slot.tensor.fill_(3)
    tensor, view = slot.tensor[4_096:].view(torch.int32), slot.view
    del slot
    gc.collect()

    assert len(slots_of() - before) == 1
    assert view[8_191] == 3
    del view
    assert tensor[0] == 0x03030303
    del tensor
    gc.collect()
    assert slots_of() == before


def test_private_slots_have_no_descriptor() -> None:
    (slot,) = make_slots(8, 1)

    assert slot.descriptor is None
    assert not slot.tensor.any()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_has_neither_mapping_nor_descriptor() -> None:
    slots = make_slots(1 << 20, 2, shared=True)
    before = slots_of()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = len(slots_of())
            # What the child maps may get the place of the slots: it survives that the slots' objects are deleted.
            pages = [mmap.mmap(-1, 1 << 20) for _ in range(4)]
            del slots
            gc.collect()
            for page in pages:
                page[0] = page[(1 << 20) - 1] = 1
            os.write(writing, bytes([kept]))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)

    assert status == 0
    assert said == b"\0"
    assert slots_of() == before
    slots[0].tensor.fill_(1)
