"""A gang: the ranks of one start of a trainer, which own a run together. A trainer that is not sharded has one rank."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

from ema_proto.averages.rules import check_matches
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.receiver.assembly import Assembly
from ema_proto.receiver.intake import Intake
from ema_proto.receiver.merging import Merging
from ema_proto.wire import messages as m
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.parts import Part, part_of, to_ranges

Key: TypeAlias = tuple[bytes | str, int, int]  # session or gang, incarnation, world


class ClaimState(Enum):
    PROBING = "probing"
    JOINING = "joining"
    STREAMING = "streaming"
    FINISHING = "finishing"


@dataclass(slots=True, eq=False)
class Claim:
    """The session of one rank; `intake` once it streams."""

    session: bytes
    peer: bytes
    join: m.Join
    state: ClaimState = ClaimState.JOINING
    intake: Intake | None = None
    finish: int | None = None  # the request of its FINISH, until that is answered

    @property
    def rank(self) -> int:
        return self.join.rank


@dataclass(slots=True, eq=False)
class Gang:
    """The ranks that own a run, or ask for it, by rank in `members`.

    `replaced` is the ticket of the gang that streamed before this one took the run over. The end of that gang is
    reported only if this one never streams itself. `since` is when its first session asked for the run, and
    `wait_until` when it must be complete. `sessions` remembers which session was which rank's, also after it has left;
    `left_at` when those left that said goodbye. `senders` are the ranks that send something, `missing_senders` those of
    them that were last reported as missing.

    `rewinds` are the requests of each rank until all have asked. `rewinding` are those that the averager works on, by
    the number of the leading rank's request, and `rewound` the answers to ranks that were away.
    """

    ticket: int
    run: str
    key: Key
    since: float
    wait_until: float
    probe_until: float = 0.0
    unanswered: set[bytes] = field(default_factory=set)  # connections of the owner that have not answered the probe
    replaced: int | None = None
    members: dict[int, Claim] = field(default_factory=dict)
    sessions: dict[int, bytes] = field(default_factory=dict)
    assembly: Assembly | None = None
    merging: Merging | None = None  # while all ranks have joined and their manifests are being merged
    parts: tuple[Part, ...] = ()
    manifests: tuple[Manifest, ...] = ()
    senders: tuple[int, ...] = ()
    missing_senders: tuple[int, ...] = ()
    left_at: dict[int, float] = field(default_factory=dict)
    published_step: int | None = None
    missing_files: tuple[str, ...] = ()  # sha256 of the companion files that rank 0 still has to send
    shared: Mapping[int, int] = field(default_factory=dict)  # slots of each rank that streams through shared memory
    reads_in_place: bool = False  # whether snapshots are read there, and not copied
    rewinds: dict[int, deque[m.Rewind]] = field(default_factory=dict)
    rewind_until: float = math.inf
    rewinding: dict[int, dict[int, m.Rewind]] = field(default_factory=dict)
    rewound: dict[int, m.Rewound] = field(default_factory=dict)
    finished: m.Finished | None = None  # the answer to the FINISH of the leading rank

    @property
    def world(self) -> int:
        return self.key[2]

    @property
    def incarnation(self) -> int:
        return self.key[1]

    @property
    def lead(self) -> int:
        """The rank whose FINISH counts."""
        return self.senders[0]

    @property
    def is_complete(self) -> bool:
        """Whether all ranks have a session, or once it streams, all that send something."""
        if self.assembly is None:
            return len(self.members) == self.world
        return all(rank in self.members for rank in self.senders)

    def admits(self, key: Key, rank: int, session: bytes) -> bool:
        """Whether this session is one of this gang: a rank that has not joined yet, or one that returns."""
        return self.key == key and self.sessions.get(rank, session) == session

    def merge(self, boxes: int) -> m.Join | None:
        """Merge about this many boxes more of the manifests of all ranks, which have joined.

        Returns:
            Once complete, one JOIN for the whole gang, of rank 0 with the merged manifest; sets `parts` and `senders`.

        Raises:
            RemoteProtocolError: `ranks_differ`, `not_tiled`, `manifest_invalid` or `bad_average`.
        """
        joins = [self.members[rank].join for rank in range(self.world)]
        first = joins[0]
        if self.world == 1:
            self.manifests = (first.manifest,)
            self.parts, self.senders = (part_of(first.manifest, range(len(first.manifest.tensors))),), (0,)
            return first
        if self.merging is None:
            for join in joins[1:]:
                _check_agreed(first, join)
            self.manifests = tuple(join.manifest for join in joins)
            self.merging = Merging(self.manifests)
        merged = self.merging.advance(boxes)
        if merged is None:
            return None
        self.merging = None
        self.parts = merged.parts
        self.senders = tuple(rank for rank, part in enumerate(merged.parts) if part.nbytes)
        try:
            check_matches(first.averages, [tensor.name for tensor in merged.manifest.tensors])
        except LocalProtocolError as error:
            raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None
        # After a restart of the server all ranks return, each with the step that it sends next.
        reconnect = any(join.reconnect for join in joins)
        return replace(
            first, manifest=merged.manifest, reconnect=reconnect, first_step=max(join.first_step for join in joins)
        )

    def start(self, slots: int, last_step: int | None, recent: tuple[int, ...], published_step: int | None) -> None:
        """The run is ready: snapshots can be assembled from now on."""
        self.assembly = Assembly(ranks=self.senders, slots=slots, last_step=last_step, recent=recent)
        self.published_step = published_step

    def ask_rewind(self, rank: int, rewind: m.Rewind, until: float) -> dict[int, m.Rewind] | None:
        """A rank asks to go back; returns the requests of all ranks, by rank, once each of them has asked."""
        if not any(self.rewinds.values()):
            self.rewind_until = until
        self.rewinds.setdefault(rank, deque()).append(rewind)
        if any(not self.rewinds.get(sender) for sender in self.senders):
            return None
        return self.take_rewinds()

    def take_rewinds(self) -> dict[int, m.Rewind]:
        """The oldest waiting request of each rank."""
        self.rewind_until = math.inf
        return {rank: waiting.popleft() for rank, waiting in self.rewinds.items() if waiting}

    def forget_rewinds(self, rank: int) -> None:
        """The session of a rank is gone: when it returns, it asks again for what it has no answer to."""
        self.rewinds.pop(rank, None)
        if not any(self.rewinds.values()):
            self.rewind_until = math.inf

    def send_of(self, rank: int) -> tuple[tuple[int, int], ...] | None:
        """JOINED's `send` for a rank: ranges of the indices that it sends; None for a trainer with one rank."""
        if self.world == 1:
            return None
        return to_ranges(self.parts[rank].indices)


def key_of(join: m.Join, session: bytes) -> Key:
    """What identifies the gang of a JOIN. A trainer with one rank is a gang of its own in each session."""
    return (session if join.gang is None else join.gang), join.incarnation, join.world


def _check_agreed(first: m.Join, join: m.Join) -> None:
    for what in ("every", "resume", "averages"):
        _check_equal(what, join.rank, getattr(first, what), getattr(join, what))
    if not first.reconnect and not join.reconnect:
        _check_equal("first_step", join.rank, first.first_step, join.first_step)


def _check_equal(what: str, rank: int, expected: object, found: object) -> None:
    if expected != found:
        text = f"{what} is {_text(expected)} on rank 0 and {_text(found)} on rank {rank}: give all ranks the same"
        raise RemoteProtocolError(RejectCode.RANKS_DIFFER, text)


def _text(value: object) -> str:
    return ", ".join(str(each) for each in value) if isinstance(value, tuple) else str(value)
