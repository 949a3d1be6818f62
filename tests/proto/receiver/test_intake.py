"""Credit and slots of one joined session."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_proto.errors import RejectCode
from ema_proto.limits import CREDIT_WINDOW_CHUNKS, SLOTS
from ema_proto.receiver.assembly import Assembly
from ema_proto.receiver.intake import Intake
from ema_proto.wire import messages as m
from ema_proto.wire.codec import Header
from support.examples import examples

CHUNK = 100


def new_intake(
    chunks: int = 3,
    *,
    checksum: bool = False,
    slots: int = SLOTS,
    last_step: int | None = None,
    recent: tuple[int, ...] = (),
) -> Intake:
    assembly = Assembly(ranks=[0], slots=slots, last_step=last_step, recent=recent)
    return Intake(assembly, 0, nbytes=chunks * CHUNK - 1, chunk_bytes=CHUNK, checksum=checksum)


def applied(intake: Intake, slot: int) -> None:
    """The averager has applied the snapshot in this slot."""
    intake._assembly.applied(slot)
    intake.applied(slot)


def chunk(step: int, attempt: int, index: int, chunks: int = 3) -> Header:
    length = CHUNK - 1 if index == chunks - 1 else CHUNK
    return Header(m.Chunk.type, bytes(16), 1, length, step, attempt, index * CHUNK)


def put(intake: Intake, header: Header) -> int | None:
    slot = intake.target(header)
    if slot is not None:
        intake.payload(header, bytes(header.length))
    return slot


def send(intake: Intake, step: int, attempt: int, chunks: int = 3, *, mode: m.Mode = "update") -> int | None:
    """A whole snapshot; returns the slot in which it is held."""
    intake.begin(m.Begin(step, attempt, mode))
    for index in range(chunks):
        put(intake, chunk(step, attempt, index, chunks))
    whole = intake.commit(m.Commit(step, attempt, chunks, chunks * CHUNK - 1))
    return None if whole is None else whole[0]


def codes(intake: Intake) -> list[RejectCode]:
    return [reply.code for reply in intake.replies if isinstance(reply, m.Reject)]


def test_snapshot_is_acknowledged_only_when_applied() -> None:
    intake = new_intake()
    slot = send(intake, 5, 1)
    assert slot is not None
    assert not any(isinstance(reply, m.Committed) for reply in intake.replies)
    applied(intake, slot)

    assert m.Committed(5, 1) in intake.replies
    assert list(intake._assembly.recent) == [5]


def test_begin_without_a_free_slot_is_refused_and_its_chunks_dropped() -> None:
    intake = new_intake()
    held = {send(intake, step, step) for step in (1, 2)}
    assert held == {0, 1}
    intake.begin(m.Begin(3, 3))

    assert codes(intake) == [RejectCode.OUT_OF_ORDER]
    assert put(intake, chunk(3, 3, 0)) is None


def test_chunks_beyond_credit_never_reach_an_occupied_slot() -> None:
    intake = new_intake()
    held = [send(intake, step, step) for step in (1, 2)]
    for index in range(100):
        assert put(intake, chunk(2, 2, index % 3)) is None
        assert put(intake, chunk(3, 3, index % 3)) is None

    assert held == [0, 1]
    assert intake.credit_limit <= 2 * 3


def test_set_may_repeat_only_the_newest_step() -> None:
    intake = new_intake(last_step=5, recent=(4, 5))

    assert send(intake, 5, 1) is None, "an update of an applied step counts once"
    assert send(intake, 4, 2, mode="set") is None
    slot = send(intake, 5, 3, mode="set")
    assert slot is not None
    applied(intake, slot)
    assert list(intake._assembly.recent) == [4, 5]
    assert m.Committed(5, 3) in intake.replies


def test_set_may_repeat_a_step_that_is_being_applied() -> None:
    intake = new_intake()

    assert send(intake, 1, 1) == 0
    assert send(intake, 1, 2, mode="set") == 1


def test_repeated_chunk_is_received_once() -> None:
    intake = new_intake()
    intake.begin(m.Begin(1, 1))

    assert put(intake, chunk(1, 1, 0)) == 0
    assert put(intake, chunk(1, 1, 0)) is None


def test_misplaced_chunk_refuses_the_attempt_once() -> None:
    intake = new_intake()
    intake.begin(m.Begin(1, 1))
    bad = Header(m.Chunk.type, bytes(16), 1, CHUNK, 1, 1, 7)
    for _ in range(5):
        assert put(intake, bad) is None
    assert intake.commit(m.Commit(1, 1, 3, 299)) is None

    assert codes(intake) == [RejectCode.BAD_CHUNK]
    assert send(intake, 1, 2) == 0


def test_incomplete_payload_refuses_the_attempt() -> None:
    intake = new_intake()
    intake.begin(m.Begin(1, 1))
    header = chunk(1, 1, 0)
    assert intake.target(header) == 0
    intake.payload(header, None)

    assert codes(intake) == [RejectCode.BAD_CHUNK]


@pytest.mark.parametrize("commit", [m.Commit(1, 1, 3, 300), m.Commit(1, 1, 2, 299), m.Commit(1, 1, 0, 0)])
def test_commit_with_other_counts_is_incomplete_despite_all_chunks(commit: m.Commit) -> None:
    intake = new_intake()
    intake.begin(m.Begin(1, 1))
    for index in range(3):
        put(intake, chunk(1, 1, index))

    assert intake.commit(commit) is None
    assert codes(intake) == [RejectCode.INCOMPLETE]
    assert intake.replies[-1] != m.Committed(1, 1)


def test_missing_agreed_checksum_counts_as_wrong() -> None:
    intake = new_intake(checksum=True)
    intake.begin(m.Begin(1, 1))
    put(intake, chunk(1, 1, 0))

    assert codes(intake) == [RejectCode.CHECKSUM]


def test_new_begin_abandons_the_incomplete_snapshot() -> None:
    intake = new_intake()
    intake.begin(m.Begin(1, 1))
    put(intake, chunk(1, 1, 0))
    intake.begin(m.Begin(2, 2))

    assert put(intake, chunk(1, 1, 1)) is None
    assert intake.commit(m.Commit(1, 1, 3, 299)) is None
    assert codes(intake) == [RejectCode.OUT_OF_ORDER]


def test_applied_step_is_acknowledged_again_and_a_skipped_one_is_not() -> None:
    intake = new_intake(last_step=10, recent=(8, 10))
    for step in (8, 9, 10):
        assert send(intake, step, step) is None

    answers = [reply for reply in intake.replies if isinstance(reply, m.Committed | m.Reject)]
    assert [type(answer) for answer in answers] == [m.Committed, m.Reject, m.Committed]
    assert codes(intake) == [RejectCode.STEP_PASSED]


def test_no_snapshot_is_accepted_between_rewind_and_its_answer() -> None:
    """Step 9 was applied before the rewind; a new step 9 must not be confused with it."""
    intake = new_intake(last_step=10, recent=(9, 10))
    intake.begin_rewind(1)
    assert send(intake, 9, 1) is None
    assert codes(intake) == [RejectCode.OUT_OF_ORDER]
    intake._assembly.rewound(8, (8,))
    intake.end_rewind(1)

    assert send(intake, 9, 2) == 0


def test_failed_rewind_leaves_the_steps_unchanged() -> None:
    intake = new_intake(last_step=10, recent=(9, 10))
    intake.begin_rewind(1)
    intake.end_rewind(1)
    assert send(intake, 9, 1) is None

    assert m.Committed(9, 1) in intake.replies


def room(intake: Intake, chunks: int, filled: int | None, held: int) -> int:
    """Chunks for which staging has room, from what the test has done itself."""
    free = SLOTS - held - (0 if filled is None else 1)
    return free * chunks + (0 if filled is None else chunks - filled)


@settings(max_examples=examples(150))
@given(seed=st.integers(0, 2**32), chunks=st.sampled_from([1, 2, 3, 8, 9, 40]))
def test_credit_never_exceeds_the_slots_and_never_runs_out(seed: int, chunks: int) -> None:
    """A correct sender against an averager that answers at any time."""
    rng = random.Random(seed)
    intake = new_intake(chunks)
    sent, limit, step, filled = 0, intake.credit_limit, 0, None
    held: list[int] = []
    for _ in range(400):
        can_send = sent < limit
        assert limit - sent <= min(CREDIT_WINDOW_CHUNKS, room(intake, chunks, filled, len(held)))
        if held and ((not can_send and filled != chunks) or rng.random() < 0.2):
            applied(intake, held.pop(0))
        elif filled is None:
            assert can_send, "a slot is free and nothing is on its way: the sender must be able to begin"
            step, filled = step + 1, 0
            intake.begin(m.Begin(step, step))
        elif filled < chunks:
            assert can_send, "nothing is held, so nothing else can bring credit"
            assert put(intake, chunk(step, step, filled, chunks)) is not None
            sent, filled = sent + 1, filled + 1
        else:
            whole = intake.commit(m.Commit(step, step, chunks, chunks * CHUNK - 1))
            assert whole is not None
            held.append(whole[0])
            filled = None
        while intake.replies:
            reply = intake.replies.popleft()
            assert not isinstance(reply, m.Reject)
            if isinstance(reply, m.Credit):
                assert reply.limit > limit
                limit = reply.limit
    assert step > 2
