"""Puts machines into a given state, and applies single messages to them."""

from __future__ import annotations

from ema_proto.averages.rules import Raw
from ema_proto.errors import RejectCode
from ema_proto.limits import CHUNK_BYTES_MIN, PROBE_S
from ema_proto.receiver import events as e
from ema_proto.receiver.machine import Receiver
from ema_proto.sender import events as se
from ema_proto.sender.events import SenderState
from ema_proto.sender.machine import Sender
from ema_proto.wire import messages as m
from ema_proto.wire.codec import Header, decode_frames, encode, encode_header
from ema_proto.wire.manifest import Role, TensorSpec, layout

SESSION = b"session of tests"
OTHER = b"another session."
EPOCH = 77
MANIFEST = layout([TensorSpec("w", "U8", (CHUNK_BYTES_MIN,), Role.PARAM, 0)])
JOIN = m.Join(run="run", first_step=1, manifest=MANIFEST, averages=(Raw(),))
RECEIVER_STATES = ("strange", "greeted", "probing", "joining", "streaming", "finishing")

MESSAGES: dict[str, m.Message] = {
    "HELLO": m.Hello(),
    "HEARTBEAT": m.Heartbeat(reply=True),
    "JOIN": JOIN,
    "BEGIN": m.Begin(1, 1),
    "CHUNK": m.Chunk(1, 1, 0, CHUNK_BYTES_MIN),
    "COMMIT": m.Commit(1, 1, 1, CHUNK_BYTES_MIN),
    "FILE": m.File(0, 0, CHUNK_BYTES_MIN),
    "SKIP": m.Skip(1, "busy"),
    "PUBLISH": m.Publish(1),
    "REWIND": m.Rewind(1, 0),
    "FINISH": m.Finish(1),
    "BYE": m.Bye(),
    "CHALLENGE": m.Challenge("nonce"),
    "WELCOME": m.Welcome(EPOCH, CHUNK_BYTES_MIN),
    "JOINED": m.Joined(None, None, (), "new", 8),
    "CREDIT": m.Credit(9),
    "COMMITTED": m.Committed(1, 1),
    "PUBLISHED": m.Published(1),
    "REWOUND": m.Rewound(1, 0),
    "FINISHED": m.Finished(1, 1),
}


class Peer:
    """Sends hand-written frames to a receiver, and reads the answers."""

    def __init__(self, receiver: Receiver, name: bytes = b"peer", session: bytes = SESSION, epoch: int = EPOCH) -> None:
        self.receiver = receiver
        self.name = name
        self.session = session
        self.epoch = epoch

    def say(self, message: m.Message, *, payload: bytes | None = None, now: float = 0.0) -> list[m.Message]:
        """Send a message; returns what the receiver answers to this peer."""
        epoch = 0 if isinstance(message, m.Hello) else self.epoch
        header, body = encode(message, session=self.session, epoch=epoch)
        return self.send(header, body if payload is None else payload, now=now)

    def send(self, header: bytes, body: bytes, *, now: float = 0.0) -> list[m.Message]:
        """Send two frames; returns what the receiver answers to this peer."""
        match self.receiver.header(self.name, header, now):
            case e.Payload(length=length):
                self.receiver.payload(body if len(body) == length else None)
            case e.FileBody(length=length):
                self.receiver.file_payload(body if len(body) == length else None)
            case e.Control():
                self.receiver.control(body)
        return self.heard()

    def heard(self) -> list[m.Message]:
        """Take this peer's messages out of the outbox."""
        mine = [frames for peer, frames in self.receiver.outbox if peer == self.name]
        others = [item for item in self.receiver.outbox if item[0] != self.name]
        self.receiver.outbox.clear()
        self.receiver.outbox.extend(others)
        return [decode_frames(frames)[1] for frames in mine]

    def codes(self, messages: list[m.Message]) -> list[RejectCode]:
        """The codes of the rejects among these."""
        return [message.code for message in messages if isinstance(message, m.Reject)]


def new_receiver(*, token: str | None = None) -> Receiver:
    """A receiver with short chunks."""
    nonces = iter(f"nonce {number}" for number in range(1_000_000))
    return Receiver(epoch=EPOCH, token=token, nonce=lambda: next(nonces), chunk_bytes=CHUNK_BYTES_MIN)


def accept(receiver: Receiver, *, last_step: int | None = None, recent: tuple[int, ...] = ()) -> e.JoinRequested:
    """Answer the last JOIN as a core would."""
    event = receiver.events.pop()
    assert isinstance(event, e.JoinRequested)
    continuation: m.Continuation = "new" if last_step is None else "continued"
    receiver.accept_join(
        event.run, event.ticket, last_step=last_step, published_step=None, recent=recent, continuation=continuation
    )
    return event


def joined_peer(receiver: Receiver, *, join: m.Join = JOIN, name: bytes = b"peer", session: bytes = SESSION) -> Peer:
    """A connected peer that streams the run."""
    peer = Peer(receiver, name, session)
    peer.say(m.Hello())
    peer.say(join)
    accept(receiver)
    peer.heard()
    return peer


def receiver_after(state: str, message: str) -> str:
    """The state of a connection that was in `state`, after this message; or the code that refused it."""
    receiver = new_receiver()
    if state == "probing":
        joined_peer(receiver, name=b"owner", session=b"session of owner")
    peer = Peer(receiver)
    if state != "strange":
        peer.say(m.Hello())
    if state not in ("strange", "greeted"):
        peer.say(JOIN)
    if state in ("streaming", "finishing"):
        accept(receiver)
    if state == "finishing":
        peer.say(m.Finish(1))
    peer.heard()
    sent = MESSAGES["CREDIT" if message == "a server's message" else message]
    answers = peer.say(sent, payload=bytes(CHUNK_BYTES_MIN) if message in ("CHUNK", "FILE") else None)
    codes = [code for code in peer.codes(answers) if code is not RejectCode.OUT_OF_ORDER]
    return codes[0].value if codes else _state_of(receiver, peer)


def _state_of(receiver: Receiver, peer: Peer) -> str:
    """Determined from outside, by the accepted calls."""
    if peer.codes(peer.say(m.Heartbeat(reply=True))):
        return "strange"
    tickets = range(1, 4)
    answer = {"last_step": None, "published_step": None, "recent": (), "continuation": "new"}
    if any(receiver.accept_join("run", ticket, **answer) for ticket in tickets):  # type: ignore[arg-type]
        return "joining"
    receiver.events.clear()
    receiver.tick(PROBE_S)
    if receiver.events:
        return "probing"
    for ticket in tickets:
        receiver.publish_answered("run", ticket, 1, None)
    if not any(isinstance(message, m.Published) for message in peer.heard()):
        return "greeted"
    return "finishing" if peer.codes(peer.say(m.Begin(9, 9))) else "streaming"


def sender_in(state: str) -> Sender:
    """A sender of this session in `state`, with an empty outbox."""
    sender = Sender(SESSION, token="secret", jitter=lambda: 0.0)
    sender.opened(0.0)
    if state != "greeting":
        give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN))
    if state in ("joining", "streaming"):
        sender.join(JOIN)
    if state == "streaming":
        give(sender, m.Joined(None, None, (), "new", 8))
    drain(sender)
    return sender


def give(sender: Sender, message: m.Message, *, session: bytes = SESSION, epoch: int = EPOCH, now: float = 0.0) -> None:
    """Deliver a message of the server to the sender."""
    sender.receive(encode(message, session=session, epoch=epoch), now)


def drain(sender: Sender) -> list[m.Message]:
    """All messages in the sender's outbox except chunks."""
    written: list[m.Message] = []
    while (out := sender.next_frame()) is not None:
        if out.payload is None:
            written.append(decode_frames((out.header, out.body))[1])
    return written


def sender_after(state: str, message: str) -> str:
    """The state of a sender that was in `state` after this message."""
    sender = sender_in(state)
    if message == "FINISHED" and state == "streaming":
        sender.request_finish()
        drain(sender)
    match message.split():
        case ["REJECT", code]:
            give(sender, m.Reject(RejectCode[code.upper()], "no"))
        case ["a", "trainer's", "message"]:
            give(sender, m.Bye())
        case ["anything", "unreadable"]:
            sender.receive((b"nonsense", b""), 0.0)
        case ["another", "major"]:
            header = Header(m.Heartbeat.type, SESSION, EPOCH, 2, major=2)
            sender.receive((encode_header(header), b"{}"), 0.0)
        case [name]:
            give(sender, MESSAGES[name])
        case _:
            raise ValueError(message)
    return sender.state.value


def done(sender: Sender) -> list[se.SnapshotDone]:
    """The snapshots that it has released."""
    return [event for event in sender.events if isinstance(event, se.SnapshotDone)]


def answered(sender: Sender) -> list[se.Answered]:
    """The requests that were answered."""
    return [event for event in sender.events if isinstance(event, se.Answered)]


def kinds(sender: Sender) -> list[str]:
    """Names of the messages in its outbox."""
    return [type(message).__name__ for message in drain(sender)]


def rejoin(sender: Sender, joined: m.Joined) -> list[m.Message]:
    """Lose the connection, open the next one, and join again; returns the messages sent before JOINED."""
    sender.lost(0.0, "cut")
    sender.opened(0.0)
    give(sender, m.Welcome(EPOCH, CHUNK_BYTES_MIN))
    sent = drain(sender)
    give(sender, joined)
    return sent


def alive(sender: Sender, until: float) -> None:
    """Heartbeats are answered, and nothing else happens."""
    now = 0.0
    while now < until and sender.state is not SenderState.DISCONNECTED:
        now += 1.0
        sender.tick(now)
        drain(sender)
        give(sender, m.Heartbeat(), now=now)


def ends(receiver: Receiver) -> list[e.SessionEnded]:
    """The sessions whose end was reported to the core."""
    return [event for event in receiver.events if isinstance(event, e.SessionEnded)]
