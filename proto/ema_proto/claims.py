"""Which session owns which run, and who waits for it. One owner and at most one rival for each run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ema_proto import messages as m
from ema_proto.intake import Intake
from ema_proto.limits import PROBE_S


class ClaimState(Enum):
    """Where a session's claim to its run stands."""

    PROBING = "probing"
    JOINING = "joining"
    STREAMING = "streaming"
    FINISHING = "finishing"


@dataclass(slots=True, eq=False)
class Claim:
    """A session and the run that it owns or asks for; `intake` once it streams."""

    ticket: int
    session: bytes
    peer: bytes
    join: m.Join
    state: ClaimState = ClaimState.JOINING
    probe_until: float = 0.0
    intake: Intake | None = None

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.join.run


class Claims:
    """All claims of a server."""

    def __init__(self) -> None:
        self._owners: dict[str, Claim] = {}
        self._rivals: dict[str, Claim] = {}
        self._tickets = 0

    def new(self, session: bytes, peer: bytes, join: m.Join) -> Claim:
        """A claim that neither owns nor waits yet."""
        self._tickets += 1
        return Claim(self._tickets, session, peer, join)

    def owner(self, run: str) -> Claim | None:
        """The session that owns the run."""
        return self._owners.get(run)

    def rival(self, run: str) -> Claim | None:
        """The session that waits for the owner's answer to a probe."""
        return self._rivals.get(run)

    def by_ticket(self, run: str, ticket: int) -> Claim | None:
        """The owner of the run if it still holds this ticket."""
        claim = self._owners.get(run)
        return claim if claim is not None and claim.ticket == ticket else None

    def of_peer(self, run: str | None, peer: bytes) -> Claim | None:
        """The claim, owner's or rival's, that `peer` is the current connection of."""
        for claim in (self._owners.get(run or ""), self._rivals.get(run or "")):
            if claim is not None and claim.peer == peer:
                return claim
        return None

    def install(self, claim: Claim) -> None:
        """Make the claim the run's owner."""
        self.remove(claim)
        claim.state = ClaimState.JOINING
        self._owners[claim.run] = claim

    def wait(self, claim: Claim, now: float) -> None:
        """Let the claim wait for the owner's answer."""
        claim.state = ClaimState.PROBING
        claim.probe_until = now + PROBE_S
        self._rivals[claim.run] = claim

    def remove(self, claim: Claim) -> None:
        """Forget the claim, whichever it is."""
        for table in (self._owners, self._rivals):
            if table.get(claim.run) is claim:
                del table[claim.run]

    def unanswered(self, now: float) -> list[Claim]:
        """Rivals whose probe ran out of time."""
        return [claim for claim in self._rivals.values() if now >= claim.probe_until]
