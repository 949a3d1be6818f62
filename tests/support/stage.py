"""Plays a transcript: lines that begin with `> ` are commands, the others are messages that the two machines then send.

    > trainer NAME [token=T] [incarnation=N] [first_step=N]   a trainer connects and asks for the run
              [files=NAME:BYTES,...]                          with companion files of this many zero bytes
              [shm=yes]                                       it passes its slots if the server takes any
    > trainer NAME rank=R world=W [gang=TEXT] …               one of its ranks, which holds a block of rows
    > NAME skips                                              it takes a step that it does not offer
    > NAME steps [N]                                          it takes N steps, and offers each if a slot is free
    > NAME publishes | rewinds N | finishes | leaves          a request of its user
    > NAME is cut off | dies                                  its connection breaks; its process is killed
    > NAME loses TYPE                                         the next message of this type to it is lost
    > stranger NAME                                           a connection whose frames the transcript writes itself
    > NAME passes slots                                      two of eight bytes
    > NAME says TYPE [field=value]... [BODY]                  one message, with these fields of the header
    > NAME says hex HEADER [BODY]                             two frames as they are
    > server has token T | listens at PATH                    before anything else
    > server restarts | publishes | quarantines | refuses CODE | damages files
    > wait SECONDS                                            the clock advances

Every message line is `NAME -> TYPE …` (to the server) or `NAME <- TYPE …`, with the header's fields that are not zero
and the JSON body as it was sent.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ema_proto.errors import RejectCode
from ema_proto.sender.events import SenderState
from ema_proto.wire import messages as m
from ema_proto.wire.codec import CONTROL_MESSAGES, Header, decode_header, encode_header
from support.memory_server import Server
from support.memory_trainer import Connection, Trainer, shard_manifest, small_manifest

TYPES = {kind: message.__name__.upper() for kind, message in CONTROL_MESSAGES.items()} | {
    m.Chunk.type: "CHUNK",
    m.File.type: "FILE",
}
_NUMBERS = {name: kind for kind, name in TYPES.items()}
_SETTLED_AFTER = 50  # rounds without silence mean an endless exchange


class Stage:
    """Server, trainers and strangers of one transcript."""

    def __init__(self, *, token: str | None = None, shm: str | None = None) -> None:
        self.now = 0.0
        self.server = Server(token=token, shm=shm)
        self.trainers: dict[str, Trainer] = {}
        self.strangers: dict[str, Connection] = {}
        self.lost: dict[str, str] = {}
        self.lines: list[str] = []

    def direct(self, direction: str) -> list[str]:
        """Execute the line; return the messages until both sides are silent."""
        self.lines = []
        who, _, what = direction.partition(" ")
        match who:
            case "trainer" | "stranger":
                self._enter(who, what)
            case "server":
                self._direct_server(what)
            case "wait":
                self._wait(float(what))
            case _ if who in self.strangers and what == "passes slots":
                self._share(who.encode().ljust(16, b"."), [bytes(8)] * 2)
            case _ if who in self.strangers:
                self._say(who, what.removeprefix("says "))
            case _:
                self._direct_trainer(self.trainers[who], what)
        self._settle()
        return self.lines

    def _enter(self, kind: str, text: str) -> None:
        name, *options = text.split()
        given = dict(option.split("=") for option in options)
        if kind == "stranger":
            self.strangers[name] = Connection(name.encode())
            return
        rank, world = int(given.get("rank", 0)), int(given.get("world", 1))
        trainer = Trainer(
            name,
            small_manifest(1.5) if world == 1 else shard_manifest(rank, world),
            token=given.get("token"),
            incarnation=int(given.get("incarnation", 0)),
            first_step=int(given.get("first_step", 1)),
            files=_files(given["files"]) if "files" in given else None,
            rank=rank,
            world=world,
            gang=None if world == 1 else given.get("gang", "job"),
            share=self._share if "shm" in given else None,
        )
        self.trainers[name] = trainer
        trainer.open(self.now)

    def _share(self, session: bytes, slots: Sequence[bytes]) -> None:
        self.server.passed[session] = slots

    def _direct_server(self, what: str) -> None:
        match what.split():
            case ["restarts"]:
                self.server.restart()
            case ["publishes"]:
                self.server.publish()
            case ["damages", "files"]:
                self.server.damages = True
            case ["quarantines"]:
                self.server.quarantine = "tensor 'weight' is not finite"
            case ["refuses", code]:
                self.server.refusal = RejectCode[code.upper()], "the keeper says no"  # as the vectors have it
            case _:
                raise ValueError(f"the server cannot {what!r}")

    def _direct_trainer(self, trainer: Trainer, what: str) -> None:
        match what.split():
            case ["steps", *count]:
                for _ in range(int(count[0]) if count else 1):
                    trainer.train(self.now)
                    self._settle()
            case ["skips"]:
                trainer.skip()
            case ["publishes"]:
                trainer.sender.request_publish(pin=False)
            case ["rewinds", step]:
                trainer.rewind(int(step))
            case ["finishes"]:
                trainer.sender.request_finish()
            case ["leaves"]:
                trainer.sender.bye()
            case ["is", "cut", "off"]:
                trainer.sender.lost(self.now, "cut")
            case ["dies"]:
                del self.trainers[trainer.name]
            case ["loses", kind]:
                self.lost[trainer.name] = kind
            case _:
                raise ValueError(f"a trainer cannot {what!r}")

    def _wait(self, seconds: float) -> None:
        self.now += seconds
        for trainer in self.trainers.values():
            if trainer.sender.state is SenderState.DISCONNECTED and self.now >= trainer.retry_at:
                trainer.open(self.now)
            trainer.sender.tick(self.now)
        self.server.receiver.tick(self.now)

    def _say(self, name: str, text: str) -> None:
        kind, *words = shlex.split(text, posix=False)
        if kind == "hex":
            frames = bytes.fromhex(words[0]), bytes.fromhex(words[1]) if len(words) > 1 else b""
            self.lines.append(f"{name} -> {len(frames[0])} and {len(frames[1])} bytes")
            self.server.take(name.encode(), frames, self.now)
            return
        body = text[text.index("{") :].encode() if "{" in text else b"{}"
        if kind in ("CHUNK", "FILE"):
            length = next(int(word.removeprefix("length=")) for word in words if word.startswith("length="))
            body = bytes(length)
        given = dict(word.split("=") for word in text.partition("{")[0].split()[1:])
        header = Header(
            type=_NUMBERS[kind],
            session=given.get("session", name).encode().ljust(16, b"."),
            epoch=int(given.get("epoch", self.server.epoch)),
            length=len(body),
            step=int(given.get("step", 0)),
            attempt=int(given.get("attempt", 0)),
            offset=int(given.get("offset", 0)),
            crc32=int(given["crc32"], 16) if "crc32" in given else None,
            major=int(given.get("major", 1)),
        )
        self._deliver(name, name.encode(), (encode_header(header), body))

    def _settle(self) -> None:
        for _ in range(_SETTLED_AFTER):
            count = len(self.lines)
            for trainer in list(self.trainers.values()):
                if trainer.connection is not None or trainer.sender.state is SenderState.CLOSED:
                    trainer.write()
                    connection = trainer.connections[-1]
                    while connection.up:
                        self._deliver(trainer.name, connection.peer, connection.up.popleft())
            self.server.work()
            self._reply()
            for trainer in self.trainers.values():
                trainer.settle()
            if len(self.lines) == count:
                return
        raise AssertionError("the machines talk in circles: " + " / ".join(self.lines[-4:]))

    def _deliver(self, name: str, peer: bytes, frames: tuple[bytes, ...]) -> None:
        self.lines.append(f"{name} -> {speech(frames)}")
        self.server.take(peer, frames, self.now)
        self.server.work()
        self._reply()

    def _reply(self) -> None:
        while self.server.receiver.outbox:
            peer, frames = self.server.receiver.outbox.popleft()
            name = peer.decode().partition("-")[0]
            line = f"{name} <- {speech(frames)}"
            trainer = self.trainers.get(name)
            if self.lost.get(name) == line.split()[2]:
                del self.lost[name]
                self.lines.append(f"{line}   (lost)")
                continue
            current = trainer is not None and trainer.connection is not None and trainer.connection.peer == peer
            self.lines.append(line if current or name in self.strangers else f"{line}   (nobody hears it)")
            if trainer is not None and current:
                trainer.sender.receive(frames, self.now)


def _files(text: str) -> dict[str, bytes]:
    return {name: bytes(int(size)) for name, _, size in (item.partition(":") for item in text.split(",") if item)}


def speech(frames: tuple[bytes, ...]) -> str:
    """One message in readable form."""
    header = decode_header(frames[0])
    shown = [TYPES.get(header.type, f"type {header.type}")]
    for field in ("major", "epoch", "step", "attempt", "offset"):
        value = getattr(header, field)
        if value and (field, value) != ("major", 1):
            shown.append(f"{field}={value}")
    if header.type in (m.Chunk.type, m.File.type):
        shown.append(f"length={header.length}")
        shown += [] if header.crc32 is None else [f"crc32={header.crc32:08x}"]
    elif len(frames[1]) > 2:
        shown.append(frames[1].decode())
    return " ".join(shown)


def play(text: str) -> str:
    """The transcript replayed: comments and commands are kept, messages are regenerated."""
    script = [line for line in text.splitlines() if not line or line.startswith(("#", "> "))]
    stage = Stage(token=_given(script, "> server has token "), shm=_given(script, "> server listens at "))
    out: list[str] = []
    for line in script:
        out.append(line)
        if line.startswith("> ") and not line.startswith(("> server has token ", "> server listens at ")):
            out += stage.direct(line.removeprefix("> "))
    return "\n".join(out) + "\n"


def _given(script: Sequence[str], beginning: str) -> str | None:
    """What the first line with this beginning says."""
    return next((line.removeprefix(beginning) for line in script if line.startswith(beginning)), None)
