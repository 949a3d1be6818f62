"""The sessions that stream: admits them to their gang, and tells them what became of the steps that they sent."""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from ema_proto.errors import RejectCode
from ema_proto.limits import (
    CHUNK_BYTES_MIN,
    CREDIT_WINDOW_CHUNKS,
    GANG_WINDOW_BYTES,
    PART_WAIT_S,
    SERVER_SILENT_S,
)
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.gang import Claim, ClaimState, Gang
from ema_proto.receiver.intake import Filled, Intake
from ema_proto.receiver.ownership import Ownership
from ema_proto.wire import messages as m
from ema_proto.wire.files import by_digest

Session: TypeAlias = tuple[Gang, Claim, Intake]

_CHUNKS_MIN = 2  # on their way from each rank, so that one is sent while another is received


class Streaming:
    """What the sessions of all gangs send of snapshots.

    Args:
        connections: where answers go.
        runs: which gang owns which run.
        events: where dropped steps and missing ranks are appended.
        chunk_bytes: how snapshots are to be cut.
    """

    def __init__(
        self, connections: Connections, runs: Ownership, events: deque[e.ReceiverEvent], *, chunk_bytes: int
    ) -> None:
        self._connections = connections
        self._runs = runs
        self._events = events
        self._chunk_bytes = chunk_bytes

    def of(self, connection: Connection) -> Session | None:
        """The session on this connection, if it streams."""
        found = self._runs.of(connection)
        if found is None or found[1].state is not ClaimState.STREAMING or found[1].intake is None:
            return None
        return found[0], found[1], found[1].intake

    def flush(self, claim: Claim) -> None:
        """Send what the session's intake has to answer."""
        if claim.intake is not None:
            while claim.intake.replies:
                self._connections.send(claim.peer, claim.intake.replies.popleft())

    def start(self, gang: Gang, continuation: m.Continuation, set_aside: str | None) -> None:
        """The averager has given the run: all sessions of the gang stream."""
        self._runs.stream(gang)
        for claim in gang.members.values():
            self._admit(gang, claim, continuation, set_aside)

    def admit_returned(self, gang: Gang) -> None:
        """Ranks that have reconnected stream again, as soon as it is known which steps are applied."""
        self.report_dropped(gang)
        if gang.assembly is None or gang.assembly.is_applying or gang.rewinding:
            return
        for claim in [claim for claim in gang.members.values() if claim.state is ClaimState.JOINING]:
            if claim.join.manifest == gang.manifests[claim.rank]:
                self._admit(gang, claim, "continued")
                self.report_dropped(gang)
            else:
                text = f"rank {claim.rank} returned with other tensors: start the job again"
                self._connections.send(claim.peer, m.Reject(RejectCode.MANIFEST_CHANGED, text))
                self._runs.leave(gang, claim, lost=False)

    def filled(self, gang: Gang, claim: Claim, filled: Filled) -> None:
        """The part of a rank is complete: report the snapshot if all are, or that this one is to be copied."""
        slot, begin, is_last = filled
        if is_last:
            source = begin.slot if gang.reads_in_place else None
            self._events.append(e.SnapshotReady(gang.run, gang.ticket, slot, begin.step, begin.mode, source))
        elif begin.slot is not None:
            self._events.append(e.PartReady(gang.run, gang.ticket, claim.rank, slot, begin.slot, begin))

    def copied(self, gang: Gang, part: e.PartReady) -> None:
        """The part of a rank is in the slot: report the snapshot if all are."""
        if gang.assembly is not None and gang.assembly.copied(part.rank, part.slot, part.begin):
            step, mode = part.begin.step, part.begin.mode
            self._events.append(e.SnapshotReady(gang.run, gang.ticket, part.slot, step, mode))

    def applied(self, gang: Gang, slot: int) -> None:
        """The snapshot in `slot` is in the averages; the slot is free."""
        if gang.assembly is None:
            return
        gang.assembly.applied(slot)
        for claim, intake in _intakes(gang):
            intake.applied(slot)
            self.flush(claim)
        self.admit_returned(gang)

    def quarantined(self, gang: Gang, slot: int, text: str) -> None:
        """The snapshot in `slot` was refused; the slot is free."""
        if gang.assembly is None:
            return
        gang.assembly.quarantined(slot)
        for claim, intake in _intakes(gang):
            intake.quarantined(slot, text)
            self.flush(claim)
        self.admit_returned(gang)

    def published(self, gang: Gang, step: int) -> None:
        """A generation of the run at `step` is durable."""
        gang.published_step = step
        for claim, _ in _intakes(gang):
            self._connections.send(claim.peer, m.Published(step))

    def leave(self, connection: Connection, now: float, *, lost: bool) -> None:
        """The session said goodbye, or (`lost`) fell silent: what it has begun cannot be whole."""
        found = self._runs.of(connection)
        if found is None:
            return
        gang, claim = found
        if gang.assembly is not None and claim.intake is not None:
            gang.assembly.lose(claim.rank, *(("lost", "is lost") if lost else ("left", "has left")))
        if not lost:
            gang.left_at[claim.rank] = now
        self._runs.leave(gang, claim, lost=lost)
        self.report_dropped(gang)

    def tick(self, now: float) -> None:
        """Let time pass: steps do not wait for ranks that are late or silent."""
        for gang in self._runs.of_several_ranks():
            self._drop_awaited_steps(gang, now)
            self._report_missing(gang, now)

    def report_dropped(self, gang: Gang) -> None:
        """Tell all ranks which steps cannot be whole any longer."""
        while gang.assembly is not None and gang.assembly.dropped:
            dropped = gang.assembly.dropped.popleft()
            for claim, intake in _intakes(gang):
                intake.dropped(dropped)
                self.flush(claim)
            if gang.world > 1:
                event = e.StepDropped(gang.run, gang.ticket, dropped.step, dropped.rank, dropped.reason, dropped.why)
                self._events.append(event)

    def _admit(self, gang: Gang, claim: Claim, continuation: m.Continuation, set_aside: str | None = None) -> None:
        """The session of a rank streams from now on. Companion files are those of rank 0."""
        assembly = gang.assembly
        if assembly is None:
            return
        claim.state = ClaimState.STREAMING
        assembly.joined(claim.rank, claim.join.first_step)
        files = claim.join.files if claim.rank == 0 else None
        window, chunk_bytes = _share(len(gang.senders), self._chunk_bytes)
        claim.intake = Intake(
            assembly,
            claim.rank,
            nbytes=gang.parts[claim.rank].nbytes,
            chunk_bytes=chunk_bytes,
            checksum=claim.join.checksum,
            window=window,
            files=tuple(files[place] for place in by_digest(files, gang.missing_files)) if files else (),
            shared_slots=gang.shared.get(claim.rank, 0),
            is_copied=not gang.reads_in_place,
        )
        joined = m.Joined(
            assembly.last_step,
            gang.published_step,
            tuple(assembly.recent),
            continuation,
            claim.intake.credit_limit,
            lane=m.SHM if claim.rank in gang.shared else m.ZMQ,
            set_aside=set_aside,
            missing_files=None if files is None else gang.missing_files,
            send=gang.send_of(claim.rank),
            chunk_bytes=None if chunk_bytes == self._chunk_bytes else chunk_bytes,
        )
        self._connections.send(claim.peer, joined)

    def _drop_awaited_steps(self, gang: Gang, now: float) -> None:
        """The other ranks do not wait for one whose connection is gone or silent, or which is late."""
        if gang.assembly is None:
            return
        for rank in gang.assembly.waits_for:
            claim = gang.members.get(rank)
            if claim is None or self._connections.is_silent(claim.peer, now - SERVER_SILENT_S):
                gang.assembly.lose(rank, "silent", f"has not been heard for {SERVER_SILENT_S:g} s")
        gang.assembly.drop_overdue(now - PART_WAIT_S)
        self.report_dropped(gang)

    def _report_missing(self, gang: Gang, now: float) -> None:
        """Report which of the ranks that send something are missing, if that has changed."""
        if gang.assembly is None:
            return
        before = now - SERVER_SILENT_S
        missing = []
        for rank in gang.senders:
            claim = gang.members.get(rank)
            is_gone = claim is None and gang.left_at.get(rank, before) <= before
            if is_gone or (claim is not None and self._connections.is_silent(claim.peer, before)):
                missing.append(rank)
        if tuple(missing) != gang.missing_senders:
            gang.missing_senders = tuple(missing)
            self._events.append(e.RanksMissing(gang.run, gang.ticket, gang.missing_senders))


def _share(ranks: int, chunk_bytes: int) -> tuple[int, int]:
    """How many chunks each of so many ranks may have on their way, and their size, by default `chunk_bytes`.

    All together have at most `GANG_WINDOW_BYTES`, except that a chunk has no less than `CHUNK_BYTES_MIN`.
    """
    share = GANG_WINDOW_BYTES // ranks
    if share < _CHUNKS_MIN * chunk_bytes:
        power_of_two = 1 << (share // _CHUNKS_MIN).bit_length() - 1
        chunk_bytes = min(chunk_bytes, max(power_of_two, CHUNK_BYTES_MIN))
    return max(_CHUNKS_MIN, min(CREDIT_WINDOW_CHUNKS, share // chunk_bytes)), chunk_bytes


def _intakes(gang: Gang) -> list[tuple[Claim, Intake]]:
    """The sessions of the gang that stream."""
    return [(claim, claim.intake) for claim in gang.members.values() if claim.intake is not None]
