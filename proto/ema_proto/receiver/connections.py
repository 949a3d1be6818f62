"""The connections of a server: greets them, sends to them, forgets silent ones.

A peer that violates the protocol gets one REJECT and is ignored until its next HELLO: frames that were in flight at the
time of the first refusal need no refusals of their own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto.auth import verify
from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import CONNECTIONS_MAX, VERSION_MAJOR
from ema_proto.wire import messages as m
from ema_proto.wire.codec import NO_SESSION, Header, encode


@dataclass(slots=True, eq=False)
class Connection:
    """One peer of the server's socket; `run` is the one that it owns or asks for."""

    peer: bytes
    seen_at: float
    session: bytes = NO_SESSION
    nonce: str | None = None
    welcomed: bool = False
    refused: bool = False
    run: str | None = None


class Connections:
    """All connections, the longest silent one first. The arguments are those of `Receiver`."""

    def __init__(
        self, *, epoch: int, token: str | None, nonce: Callable[[], str], chunk_bytes: int, shm: str | None = None
    ) -> None:
        self.outbox: deque[tuple[bytes, tuple[bytes, bytes]]] = deque()
        self.rejects: Counter[RejectCode] = Counter()
        self.greeted = 0
        self._epoch = epoch
        self._token = token
        self._nonce = nonce
        self._chunk_bytes = chunk_bytes
        self._shm = shm
        self._by_peer: OrderedDict[bytes, Connection] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_peer)

    def heard(self, peer: bytes, now: float) -> Connection:
        """The connection of a peer that has just sent something, known or new."""
        connection = self._by_peer.get(peer)
        if connection is None:
            if len(self._by_peer) >= CONNECTIONS_MAX:
                self._forget_one_without_run()
            connection = self._by_peer[peer] = Connection(peer, now)
        connection.seen_at = now
        self._by_peer.move_to_end(peer)
        return connection

    def forget_silent(self, before: float) -> list[Connection]:
        """Forget, and return, the connections that were last heard before this time."""
        forgotten = []
        while self._by_peer and next(iter(self._by_peer.values())).seen_at < before:
            forgotten.append(self._by_peer.popitem(last=False)[1])
        return forgotten

    def is_current(self, connection: Connection) -> bool:
        """Whether the connection is still known, greeted and not refused."""
        return connection.welcomed and self._by_peer.get(connection.peer) is connection

    def is_silent(self, peer: bytes, before: float) -> bool:
        """Whether nothing was heard from this connection since this time."""
        connection = self._by_peer.get(peer)
        return connection is None or connection.seen_at < before

    def is_greeted(self, peer: bytes) -> bool:
        """Whether the HELLO of this connection was accepted."""
        connection = self._by_peer.get(peer)
        return connection is not None and connection.welcomed

    def check_current(self, connection: Connection, header: Header) -> None:
        """Refuse a frame of another server start, or of a session that was not greeted on this connection.

        Raises:
            RemoteProtocolError: `stale_epoch` or `unknown_connection`.
        """
        if header.epoch not in (0, self._epoch):
            raise RemoteProtocolError(RejectCode.STALE_EPOCH, "the server has restarted since: say HELLO again")
        if not connection.welcomed or header.session != connection.session:
            raise RemoteProtocolError(RejectCode.UNKNOWN_CONNECTION, "this connection was not greeted: say HELLO")

    def greet(self, connection: Connection, session: bytes, hello: m.Hello) -> None:
        """Answer a HELLO by WELCOME or CHALLENGE; a repeated one gets the same answer.

        Raises:
            RemoteProtocolError: `version`, `unauthorized`, or `bad_message` for a second session on one connection.
        """
        connection.refused = False
        if session == NO_SESSION or connection.session not in (NO_SESSION, session):
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "a connection has one session, and its id is not zero")
        connection.session = session
        if VERSION_MAJOR not in hello.majors:
            spoken = ", ".join(str(major) for major in hello.majors)
            text = f"this server speaks protocol {VERSION_MAJOR}, the trainer {spoken}: upgrade the older side"
            raise RemoteProtocolError(RejectCode.VERSION, text)
        if self._token is None or connection.welcomed or self._is_proven(connection, self._token, hello.proof):
            self.greeted += not connection.welcomed
            connection.welcomed = True
            # What came later is offered only to a sender that knows it: what others receive does not change.
            offered = (m.FILES,) if self._shm is None else (m.FILES, m.SHM)
            capabilities = (m.CRC32, *(name for name in offered if name in hello.capabilities))
            shm = self._shm if m.SHM in capabilities else None
            self.send(connection.peer, m.Welcome(self._epoch, self._chunk_bytes, capabilities, shm))
        else:
            connection.nonce = connection.nonce or self._nonce()
            self.send(connection.peer, m.Challenge(connection.nonce))

    def refuse(self, connection: Connection, code: RejectCode, text: str) -> None:
        """The connection has to say HELLO again; sent once, counted each time."""
        connection.welcomed = False
        if connection.refused:
            self.rejects[code] += 1
        else:
            connection.refused = True
            self.send(connection.peer, m.Reject(code, text))

    def dismiss(self, peer: bytes) -> None:
        """The session has a newer connection: ignore frames of this one."""
        connection = self._by_peer.get(peer)
        if connection is not None:
            connection.welcomed, connection.run = False, None

    def leave(self, peer: bytes) -> None:
        connection = self._by_peer.get(peer)
        if connection is not None:
            connection.run = None

    def send(self, peer: bytes, message: m.Message) -> None:
        """Put a message for `peer` into the outbox, unless it was forgotten."""
        if isinstance(message, m.Reject):
            self.rejects[message.code] += 1
        connection = self._by_peer.get(peer)
        if connection is not None:
            self.outbox.append((peer, encode(message, session=connection.session, epoch=self._epoch)))

    def _is_proven(self, connection: Connection, token: str, proof: str | None) -> bool:
        """Whether the token is proved; False without a proof or a challenge. A nonce is good for one attempt."""
        if proof is None or connection.nonce is None:
            return False
        nonce, connection.nonce = connection.nonce, None
        if not verify(token, proof, nonce=nonce, session=connection.session):
            text = "the token is wrong: set EMA_TOKEN to the server's"
            raise RemoteProtocolError(RejectCode.UNAUTHORIZED, text)
        return True

    def _forget_one_without_run(self) -> None:
        peer = next((peer for peer, connection in self._by_peer.items() if connection.run is None), None)
        if peer is not None:
            del self._by_peer[peer]
