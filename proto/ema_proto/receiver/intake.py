"""What one rank sends of the snapshots of its run: slots, credit, and the answers to COMMIT.

A slot is free, filling, or held until the averager has answered. A step is applied at most once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import CREDIT_WINDOW_CHUNKS
from ema_proto.receiver.assembly import Assembly, Dropped
from ema_proto.receiver.file_intake import FileIntake
from ema_proto.wire import messages as m
from ema_proto.wire.chunks import Coverage, count_chunks
from ema_proto.wire.codec import Header, decode_chunk
from ema_proto.wire.files import FileSpec


@dataclass(slots=True)
class _Filling:
    slot: int
    begin: m.Begin
    coverage: Coverage
    refused: bool = False


class Filled(NamedTuple):
    """A part that is complete: where, and whether it was the last one of its snapshot."""

    slot: int
    begin: m.Begin
    is_last: bool


class Intake:
    """One rank's end of an assembly: parts of `nbytes` bytes each.

    With `checksum`, chunks carry a CRC-32 that must match. `window` is the number of chunks that may be on their way.
    `files` are companion files that come first: before they are whole, no credit is given for snapshots. With
    `shared_slots`, snapshots come in so many slots of the rank's, which the server has mapped, and not in chunks: it
    reads them there, or copies them (`is_copied`).
    """

    def __init__(
        self,
        assembly: Assembly,
        rank: int,
        *,
        nbytes: int,
        chunk_bytes: int,
        checksum: bool,
        window: int = CREDIT_WINDOW_CHUNKS,
        files: tuple[FileSpec, ...] = (),
        shared_slots: int = 0,
        is_copied: bool = False,
    ) -> None:
        self.replies: deque[m.Committed | m.Credit | m.Reject] = deque()
        self.files = FileIntake(files, chunk_bytes=chunk_bytes, checksum=checksum)
        self._assembly = assembly
        self._rank = rank
        self._nbytes = nbytes
        self._chunk_bytes = chunk_bytes
        self._checksum = checksum
        self._window = window
        self._shared_slots = shared_slots
        self._is_copied = shared_slots > 0 and is_copied
        self._filling: _Filling | None = None
        self._held: dict[int, m.Begin] = {}
        self._rewinds: set[int] = set()  # requests that are not answered
        self._received_chunks = 0
        self.credit_limit = self._allowance()

    def begin(self, begin: m.Begin, now: float = 0.0) -> None:
        """A snapshot starts; one still filling is abandoned. A step that can no longer count gets no slot.

        Raises:
            RemoteProtocolError: `bad_message`; its slot is not one of this rank's shared ones.
        """
        if not self._is_of_lane(begin.slot):
            named = "no slot" if begin.slot is None else f"slot {begin.slot}"
            text = f"BEGIN names {named}, and this session shares {self._shared_slots} slots"
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, text)
        if self._rewinds or not self._can_count(begin):
            return
        self._filling = None
        why = self._assembly.why_not(self._rank, begin)
        if why is not None:
            self._filling = _Filling(-1, begin, self._coverage(), refused=True)
            self._reject(begin, RejectCode.DROPPED, f"step {begin.step}: {why}")
            return
        if not self.files.whole or not self._nbytes:
            what = "this rank sends nothing" if self.files.whole else "files are missing"
            self._reject(begin, RejectCode.OUT_OF_ORDER, f"BEGIN came without credit: {what}")
            return
        slot = self._assembly.begin(self._rank, begin, now)
        if slot is None:
            self._reject(begin, RejectCode.OUT_OF_ORDER, "BEGIN came without credit: no slot is free")
            return
        self._filling = _Filling(slot, begin, self._coverage())

    def target(self, header: Header) -> int | None:
        """The slot for a chunk; None when its payload is to be dropped."""
        self._received_chunks += 1
        filling = self._filling
        if filling is None or filling.refused or self._is_other(filling, header.step, header.attempt):
            self._grant()
            return None
        try:
            chunk = decode_chunk(header)
            if not filling.coverage.holds(chunk.offset, chunk.length):
                return filling.slot
        except RemoteProtocolError as error:
            self._refuse(filling, error.code, error.text)
        self._grant()
        return None

    def payload(self, header: Header, received: memoryview | bytes | None) -> None:
        """The chunk's bytes are in their slot; None when their number was not the header's."""
        filling = self._filling
        if filling is not None and received is None:
            self._refuse(filling, RejectCode.BAD_CHUNK, f"the chunk at {header.offset} has not {header.length} bytes")
        elif filling is not None and self._checksum and header.crc32 != crc32(received or b""):
            self._refuse(filling, RejectCode.CHECKSUM, f"the chunk at {header.offset} has another checksum")
        elif filling is not None:
            filling.coverage.add(header.offset)
        self._grant()

    def file_target(self, part: m.File) -> None:
        """Check that a part of a companion file is the next one.

        Raises:
            RemoteProtocolError: `bad_message`; it is not.
        """
        self.files.expect(part)
        self._received_chunks += 1

    def file_stored(self) -> None:
        """A part of a companion file is stored."""
        self.files.stored()
        self._grant()

    def commit(self, commit: m.Commit) -> Filled | None:
        """The rank has sent everything; returns its part if that is complete.

        One that is still to be copied from a shared slot is not the last one before that.
        """
        filling = self._filling
        if filling is None or self._is_other(filling, commit.step, commit.attempt):
            self._answer_unexpected(commit)
            return None
        self._filling = None
        if not filling.refused:
            problem = self._incomplete(commit, filling.coverage)
            if problem is None:
                self._held[filling.slot] = filling.begin
                copying = filling.begin if self._is_copied else None
                is_last = self._assembly.whole(self._rank, filling.slot, copying)
                return Filled(filling.slot, filling.begin, is_last)
            self._reject(commit, RejectCode.INCOMPLETE, problem)
        self._grant()
        return None

    def skip(self, skip: m.Skip) -> None:
        """This rank sends nothing of a step."""
        self._filling = None
        self._assembly.skip(self._rank, skip.step, skip.why)
        self._grant()

    def applied(self, slot: int) -> None:
        held = self._held.pop(slot, None)
        if held is not None:  # None: the rank has reconnected since
            self.replies.append(m.Committed(held.step, held.attempt))
        self._grant()

    def quarantined(self, slot: int, text: str) -> None:
        held = self._held.pop(slot, None)
        if held is not None:
            self._reject(held, RejectCode.NOT_FINITE, text)
        self._grant()

    def dropped(self, dropped: Dropped) -> None:
        """A step cannot be whole; what this rank has sent of it is lost. Its slot may hold another step by now."""
        text = f"step {dropped.step}: {dropped.why}"
        held, filling = None if dropped.slot is None else self._held.get(dropped.slot), self._filling
        if dropped.slot is not None and held is not None and _is_same(held, dropped):
            del self._held[dropped.slot]
            self._reject(held, RejectCode.DROPPED, text)
        elif filling is not None and not filling.refused and _is_same(filling.begin, dropped):
            self._refuse(filling, RejectCode.DROPPED, text)
        self._grant()

    def begin_rewind(self, request: int) -> bool:
        """A rewind is asked for; until it is answered, no snapshot is accepted. False if that is known already."""
        if request in self._rewinds:
            return False
        self._rewinds.add(request)
        self._filling = None
        self._assembly.lose(self._rank, "rewound", "rewinds")
        return True

    def end_rewind(self, request: int) -> bool:
        """The rewind is done, or has failed and the run is unchanged; False if this session has not asked for it."""
        if request not in self._rewinds:
            return False
        self._rewinds.remove(request)
        self._grant()
        return True

    def _is_of_lane(self, slot: int | None) -> bool:
        """Whether a BEGIN is one of this session's lane: with a shared slot, or without if there are none."""
        return slot is None if self._shared_slots == 0 else slot is not None and slot < self._shared_slots

    def _can_count(self, begin: m.Begin) -> bool:
        """Whether the step is above all before it; a `set` may also repeat the newest."""
        lowest = begin.step + (begin.mode == "set")
        return not self._assembly.is_passed(lowest) and all(held.step < lowest for held in self._held.values())

    def _is_other(self, filling: _Filling, step: int, attempt: int) -> bool:
        return (filling.begin.step, filling.begin.attempt) != (step, attempt)

    def _incomplete(self, commit: m.Commit, coverage: Coverage) -> str | None:
        missing, chunks = coverage.missing, coverage.chunks
        if missing:
            return f"{missing} of {chunks} chunks are missing, the first at byte {coverage.first_missing()}"
        if (commit.chunks, commit.nbytes) == (chunks, self._nbytes):
            return None
        said = f"COMMIT says {commit.chunks} chunks and {commit.nbytes} bytes"
        return f"{said}, the snapshot has {chunks} and {self._nbytes}"

    def _answer_unexpected(self, commit: m.Commit) -> None:
        if any((held.step, held.attempt) == (commit.step, commit.attempt) for held in self._held.values()):
            return
        if self._rewinds:
            self._reject(commit, RejectCode.OUT_OF_ORDER, f"COMMIT of step {commit.step} came while the run goes back")
        elif commit.step in self._assembly.recent:
            self.replies.append(m.Committed(commit.step, commit.attempt))
        elif self._assembly.is_passed(commit.step):
            text = f"step {self._assembly.last_step} was applied before step {commit.step} was whole"
            self._reject(commit, RejectCode.STEP_PASSED, text)
        else:
            self._reject(commit, RejectCode.OUT_OF_ORDER, f"COMMIT of step {commit.step} came without its BEGIN")

    def _refuse(self, filling: _Filling, code: RejectCode, text: str) -> None:
        filling.refused = True
        self._reject(filling.begin, code, text)

    def _reject(self, what: m.Begin | m.Commit, code: RejectCode, text: str) -> None:
        self.replies.append(m.Reject(code, text, what.step, what.attempt))

    def _coverage(self) -> Coverage:
        """No chunks come of a snapshot in a shared slot."""
        return Coverage(0 if self._shared_slots else self._nbytes, self._chunk_bytes)

    def _allowance(self) -> int:
        """Chunks that may be sent now: as many as the slots have room for, at most a window; or parts of files."""
        if not self.files.whole:
            return self.files.allowance
        missing = self._filling.coverage.missing if self._filling else 0
        free = self._assembly.slots - len(self._held) - (1 if self._filling else 0)
        return min(self._window, missing + free * count_chunks(self._nbytes, self._chunk_bytes))

    def _grant(self) -> None:
        """Raise the limit if it grows by half a window, or if the sender has no credit left."""
        allowance = self._allowance()
        limit = self._received_chunks + allowance
        grown = limit - self.credit_limit
        is_out = self.credit_limit <= self._received_chunks
        if allowance > 0 and grown > 0 and (is_out or grown >= self._window // 2):
            self.credit_limit = limit
            self.replies.append(m.Credit(limit))


def _is_same(begin: m.Begin, dropped: Dropped) -> bool:
    return (begin.step, begin.mode) == (dropped.step, dropped.mode)
