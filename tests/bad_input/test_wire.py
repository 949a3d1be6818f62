"""Malformed and unexpected messages to a real server's socket leave a streaming run unchanged."""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

import pytest
import torch
import zmq
from safetensors.torch import load_file

from ema_proto.averages.specs import parse_averages
from ema_proto.errors import RejectCode
from ema_proto.limits import FRAME_BYTES_MAX
from ema_proto.wire import messages as m
from ema_proto.wire.codec import decode_frames, encode
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_reader import Reader
from support.processes import Process, ServerProcess
from support.toy import Toy, check_version, ledger_steps
from trainer_client import EmaClient, JoinError

WAIT_S = 60.0
_Said = TypeVar("_Said", bound=m.Message)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("wire") / "data") as process:
        yield process


def check_run(server: ServerProcess, run: str, steps: int, to: Path) -> None:
    """The run's average is the replay of steps 1 to `steps`."""
    with Reader(server.http) as reader:
        about = check_version(reader.download(reader.version(run, "ema-0.9"), to))
    assert list(ledger_steps(about["ledger"])) == list(range(1, steps + 1))


def test_oversized_frame_disconnects_only_its_sender(server: ServerProcess, tmp_path: Path) -> None:
    with EmaClient(server.zmq, "beside", ["ema:0.9"], when_behind="wait") as client, zmq.Context() as context:
        client.update(Toy().at(1), 1)
        for step, length in enumerate((FRAME_BYTES_MAX + 1, 4 * FRAME_BYTES_MAX), start=2):
            with context.socket(zmq.DEALER) as stranger, stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
                stranger.setsockopt(zmq.LINGER, 0)
                stranger.connect(server.zmq)
                stranger.send_multipart([b"EMAS".ljust(64, b"\0"), bytes(length)])
                assert monitor.poll(int(WAIT_S * 1000)), "the server hangs up"
                stranger.disable_monitor()
            client.update(Toy().at(step), step)
        assert client.flush(WAIT_S)
        assert client.stats()["reconnects"] == 0

    check_run(server, "beside", 3, tmp_path / "out")


def test_non_zeromq_bytes_disturb_no_run(server: ServerProcess, tmp_path: Path) -> None:
    rng = random.Random(11)
    host, _, port = server.zmq.removeprefix("tcp://").rpartition(":")
    openings = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01",
        b"\xff" * 9 + b"\x7f",
        b"\xff\0\0\0\0\0\0\0\1\x7f\3",
    ]
    with EmaClient(server.zmq, "noise", ["ema:0.9"], when_behind="wait") as client:
        open_ones = []
        for step in range(1, 41):
            stranger = socket.create_connection((host, int(port)), timeout=WAIT_S)
            stranger.sendall(rng.choice(openings) + rng.randbytes(rng.choice([0, 1, 64, 5000])))
            open_ones.append(stranger)
            if step % 2:
                open_ones.pop(rng.randrange(len(open_ones))).close()
            client.update(Toy().at(step), step)
        assert client.flush(WAIT_S)
        for stranger in open_ones:
            stranger.close()

    check_run(server, "noise", 40, tmp_path / "out")


class Trainer:
    """A session whose messages are written by hand, over a separate connection."""

    def __init__(self, server: ServerProcess, session: bytes) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self._socket.connect(server.zmq)
        self._session = session
        self._epoch = 0
        self.say(m.Hello())
        self._epoch = self.hear(m.Welcome).epoch

    def say(self, message: m.Message, payload: bytes | None = None) -> None:
        header, body = encode(message, session=self._session, epoch=self._epoch)
        self._socket.send_multipart((header, body if payload is None else payload))

    def hear(self, kind: type[_Said]) -> _Said:
        """The next message, which must be of this kind; other messages of the server are skipped."""
        while True:
            header, body = self._socket.recv_multipart()
            message = decode_frames((header, body))[1]
            if isinstance(message, kind):
                return message
            assert isinstance(message, m.Heartbeat | m.Credit | m.Published), message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)


def one_tensor(name: str, *shape: int) -> Manifest:
    return layout([TensorSpec("first", "F32", (2,), Role.PARAM, 0), TensorSpec(name, "F32", shape, Role.PARAM, 0)])


@pytest.mark.parametrize(
    ("other", "says"),
    [(one_tensor("second", 5), "'second'"), (one_tensor("third", 4), "'third'")],
    ids=["another shape", "another name"],
)
def test_reconnect_with_another_model_is_refused_and_the_run_goes_on(
    server: ServerProcess, tmp_path: Path, other: Manifest, says: str
) -> None:
    run = f"changed-{says.strip(chr(39))}"
    manifest, averages = one_tensor("second", 4), parse_averages(["ema:0.5"])
    ask = m.Join(run=run, first_step=1, manifest=manifest, averages=averages)
    session = run.encode().ljust(16, b".")[:16]
    with Trainer(server, session) as trainer:
        trainer.say(ask)
        assert trainer.hear(m.Joined).continuation == "new"
        trainer.say(m.Begin(1, 1))
        trainer.say(m.Chunk(1, 1, 0, manifest.nbytes), torch.ones(6).numpy().tobytes())
        trainer.say(m.Commit(1, 1, 1, manifest.nbytes))
        trainer.hear(m.Committed)
    with Trainer(server, session) as trainer:
        trainer.say(m.Join(run=run, first_step=2, manifest=other, averages=averages, reconnect=True))
        refused = trainer.hear(m.Reject)
    assert refused.code is RejectCode.MANIFEST_CHANGED
    assert says in refused.text
    with Trainer(server, b"the next process") as trainer:
        trainer.say(m.Join(run=run, first_step=2, manifest=manifest, averages=averages))
        assert (trainer.hear(m.Joined).continuation, server.get(f"/v1/runs/{run}")["step"]) == ("continued", 1)
        trainer.say(m.Begin(2, 1))
        trainer.say(m.Chunk(2, 1, 0, manifest.nbytes), torch.full((6,), 3.0).numpy().tobytes())
        trainer.say(m.Commit(2, 1, 1, manifest.nbytes))
        trainer.hear(m.Committed)
        trainer.say(m.Finish(1))
        assert trainer.hear(m.Finished).step == 2

    with Reader(server.http) as reader:
        found = load_file(reader.download(reader.version(run, "ema-0.5"), tmp_path / "out") / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"first": [2.0] * 2, "second": [2.0] * 4}


_STREAMING = """
import sys, time, torch
from trainer_client import EmaClient, JoinError

client = EmaClient(sys.argv[1], sys.argv[2], ["raw"], when_behind="wait")
model = torch.nn.Linear(2, 2)
for step in range(1, 10_000):
    client.update(model, step)
    if step == 3:
        print(client.flush(durable=True), flush=True)
    if client.stats()["state"] == "failed":
        print("went on", flush=True)
        break
    time.sleep(0.01)
"""


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "suspended"])
def test_dead_trainer_is_replaced_at_once_and_does_no_harm_later(server: ServerProcess, fate: signal.Signals) -> None:
    """The new one uses its default timeouts. The old one is evicted when it wakes, and its training continues."""
    run = f"gone-{fate.name}"
    with Process("-c", _STREAMING, server.zmq, run) as old:
        old.wait_line(lambda line: line == "True")
        with pytest.raises(JoinError, match="live trainer"):
            EmaClient(server.zmq, run, ["raw"], step=3).update(torch.nn.Linear(2, 2))
        old.send(fate)
        with EmaClient(server.zmq, run, ["raw"], step=1_000_000) as new:
            new.update(torch.nn.Linear(2, 2))
            assert new.flush(WAIT_S)
            old.send(signal.SIGCONT)
            if fate is signal.SIGSTOP:
                old.wait_line(lambda line: line == "went on")
            assert server.get(f"/v1/runs/{run}")["step"] == 1_000_001
