"""`EmaClient.pull` with a real server: it stays correct when the server is killed, and on several ranks."""

from __future__ import annotations

import copy
import http.server
import re
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ema_reader import Reader
from support.processes import Process, ServerProcess
from support.served import Served
from support.waiting import eventually
from trainer_client import EmaClient

_GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "pull.md"
_AVERAGES = ["raw", "ema:0.9,name=ema"]


def _net(size: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].to(one[name])) for name in one)


def _served(url: str, version: str | None) -> dict[str, Tensor]:
    with Reader(url) as reader:
        return reader.load(f"r/ema@{version}")


class _Trainer:
    """Trains a small model, one step at a time."""

    def __init__(self, server: ServerProcess, size: int = 8) -> None:
        self.model = _net(size)
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.client = EmaClient(server.zmq, run="r", averages=_AVERAGES, when_behind="wait")
        self.client.attach(self.model, self.optimizer)
        self._size = size

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self._size)).square().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_holds_each_due_version_in_place_while_the_student_trains(tmp_path: Path, dtype: torch.dtype) -> None:
    with ServerProcess(tmp_path / "data") as server:
        trainer = _Trainer(server)
        teacher = copy.deepcopy(trainer.model).to(dtype)
        places = [tensor.data_ptr() for tensor in teacher.state_dict().values()]
        pull = trainer.client.pull(teacher, every=5, url=server.http)
        held: list[int | None] = []
        while len(held) < 3:
            trainer.step()
            if trainer.client.steps % 5 == 4:  # whole before the next due step
                eventually(lambda: all(thread.name != "ema-pull" for thread in threading.enumerate()), "it is ready")
            if pull.step is not None and pull.step not in held:
                held.append(pull.step)
                assert _equal(_state(teacher), _served(server.http, pull.version))
        assert trainer.client.stats()["pulls"][0]["copied"] == 3
        assert trainer.client.finish()

    assert held == [5, 10, 15]
    assert [tensor.data_ptr() for tensor in teacher.state_dict().values()] == places


@contextmanager
def _slow(upstream: str) -> Iterator[str]:
    """A way to the server that takes seconds for a megabyte; a connection ends with the server's."""
    address = urlsplit(upstream)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                with socket.create_connection((str(address.hostname), address.port or 0), timeout=30.0) as server:
                    threading.Thread(target=self._requests, args=(server,), daemon=True).start()
                    while piece := server.recv(1 << 14):
                        self.request.sendall(piece)
                        time.sleep(0.02)
            except OSError:
                pass  # either end is gone

        def _requests(self, server: socket.socket) -> None:
            try:
                while piece := self.request.recv(1 << 16):
                    server.sendall(piece)
            except OSError:
                pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(30.0)


def test_server_killed_in_mid_download_leaves_the_teacher_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 512  # a megabyte
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    server = ServerProcess(tmp_path / "data")
    with _slow(server.http) as url:
        trainer = _Trainer(server, size)
        teacher = copy.deepcopy(trainer.model)
        before = _state(teacher)
        pull = trainer.client.pull(teacher, every=5, url=url)
        for _ in range(5):
            trainer.step()
        begun = eventually(lambda: [path for path in downloads.rglob("*.partial") if path.stat().st_size], "it begins")
        arrived = begun[0].stat().st_size
        with server:
            server.kill()
        for _ in range(10):
            trainer.step()
        assert arrived < 4 * size * size
        assert (pull.step, _equal(_state(teacher), before)) == (None, True)
        with ServerProcess(tmp_path / "data", zmq=server.zmq, http=urlsplit(server.http).netloc) as again:
            assert pull.wait(60.0)
            assert _equal(_state(teacher), _served(again.http, pull.version))
            trainer.client.close()

    assert pull.step is not None
    assert list(downloads.iterdir()) == []


_EXITS = """
import sys, time
from pathlib import Path
from torch import nn
from trainer_client import EmaClient

net = nn.Module()
net.weight, net.bias = nn.Parameter(nn.Linear(4, 1 << 16).weight.detach()), nn.Parameter(nn.Linear(1, 3).bias.detach())
client = EmaClient("tcp://127.0.0.1:1", run="r", averages=["ema:0.9,name=ema"], rank=1)
client.pull(net, every=1, url=sys.argv[1])
client.update(net, 1)
while not [path for path in Path(sys.argv[2]).rglob("*.partial") if path.stat().st_size]:
    time.sleep(0.01)
if sys.argv[3] == "closes":
    client.close()
"""


@contextmanager
def _hanging(upstream: str) -> Iterator[str]:
    """A way to the server on which each file stops after some of its bytes; the connection stays open."""
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with httpx2.Client(base_url=upstream, trust_env=False) as client:
                answer = client.get(self.path)
            self.send_response_only(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            is_file = "/files/" in self.path
            self.wfile.write(answer.content[: 1 << 16] if is_file else answer.content)
            self.wfile.flush()
            if is_file:
                release.wait(120.0)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            release.set()
            server.shutdown()
            thread.join(30.0)


@pytest.mark.parametrize("end", ["closes", "does not close"])
def test_download_that_hangs_does_not_keep_the_trainer_from_ending(tmp_path: Path, end: str) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    served = Served(tmp_path / "data")
    served.publish("r", 1, ["ema"], size=1 << 16)
    command = ("-c", _EXITS, "URL", str(downloads), end)
    with served.listening() as upstream, _hanging(upstream) as url:
        script = [url if word == "URL" else word for word in command]
        with Process(*script, env={"TMPDIR": str(downloads)}) as trainer:
            assert trainer.wait(25.0) == 0, list(trainer.errors)  # a request alone waits for 30 s
    served.close()

    assert list(trainer.errors) == []


_RANK = """
import os, sys, threading, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainer_client import EmaClient

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
model = DistributedDataParallel(nn.Linear(4, 4))
teacher = nn.Linear(4, 4).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ema = EmaClient(sys.argv[1], run="r", averages=["ema:0.9,name=ema"], when_behind="wait")
ema.attach(model, optimizer)
pull = ema.pull(teacher, every=5, url=sys.argv[2])
for step in range(1, 31):
    optimizer.zero_grad()
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    if step % 5 == 4:
        while any(thread.name == "ema-pull" for thread in threading.enumerate()):
            time.sleep(0.01)
        dist.barrier()
    line = f"rank {rank} at {step}: {pull.step} {pull.version} {teacher.weight.sum().item()}\\n"
    os.write(1, line.encode())  # whole lines, whatever the other rank prints
dist.barrier()
ema.finish()
dist.destroy_process_group()
"""


def test_every_rank_copies_the_same_version_after_the_same_step(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_RANK)
    with ServerProcess(tmp_path / "data") as server:
        launched = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
        with Process(*launched, server.zmq, server.http) as trainer:
            assert trainer.wait(180.0) == 0, list(trainer.errors)
    lines = [line.removeprefix("rank ").split(" ", 1) for line in trainer.lines if line.startswith("rank ")]
    first, second = ([line for rank, line in lines if rank == number] for number in "01")
    steps = [int(found[1]) for line in first if (found := re.search(r": (\d+) ", line))]

    assert len(first) == 30
    assert [line for line in first if ": None" not in line] == [line for line in second if ": None" not in line]
    assert steps == [step for due in range(5, 30, 5) for step in [due] * 5][: len(steps)]
    assert len(steps) == 21


def test_example_of_the_guide_runs(tmp_path: Path) -> None:
    script = re.findall(r"```python\n(.*?)```", _GUIDE.read_text(), flags=re.DOTALL)[0]
    pause = "        __import__('time').sleep(2)\n        print"
    with ServerProcess(tmp_path / "data") as server:
        for printed, here in (
            ("tcp://127.0.0.1:5555", server.zmq),
            ("http://127.0.0.1:8080", server.http),
            ("range(1, 1001)", "range(1, 401)"),
            ("        print", pause),  # the steps of this small model take less time than a download
        ):
            assert script.count(printed) == 1
            script = script.replace(printed, here)
        with Process("-c", script) as trainer:
            assert trainer.wait() == 0, list(trainer.errors)
        state = server.get("/v1/runs/distilled")["state"]

    assert state == "finished"
    assert not any("pull" in line for line in trainer.errors)
    assert len(trainer.lines) == 4
    assert trainer.lines[0] == "step 100: the teacher is the average at step None"
    assert re.fullmatch(r"step 400: the teacher is the average at step \d+", trainer.lines[-1])
