"""Changes of a model during training are followed, or refused by name, and nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_reader import Reader
from support.processes import ServerProcess
from trainer_client import EmaClient, PlanError

WAIT_S = 60.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("models") / "data") as process:
        yield process


@pytest.fixture
def run() -> str:
    return f"run-{next(_numbers)}"


class Reassigning(nn.Module):
    """The forward pass replaces a buffer by another tensor, as many running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.5 * self.seen + x.detach().mean(0)
        y: Tensor = self.linear(x) + self.seen
        return y


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    model(torch.randn(3, 4, dtype=dtype)).square().mean().backward()
    optimizer.step()


def write_through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
        parameter.data = parameter.data + 1


def load_others(model: nn.Module) -> None:
    model.load_state_dict(Reassigning().state_dict())


def assign_others(model: nn.Module) -> None:
    model.load_state_dict(Reassigning().state_dict(), assign=True)


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_parameter("linear.weight").requires_grad_(True)


@pytest.mark.parametrize("change", [write_through_data, load_others, assign_others, freeze])
def test_new_values_of_the_same_tensors_are_streamed(
    server: ServerProcess, run: str, tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    """`raw` is bit for bit the model after the last step; the average is lerp over every step."""
    torch.manual_seed(0)
    model, shadow = Reassigning(), dict[str, Tensor]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with EmaClient(server.zmq, run, ["raw", "ema:0.5"], when_behind="wait") as client:
        client.attach(model, optimizer)
        for step in range(1, 11):
            if step == 6:
                change(model)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            train(model, optimizer)
            for name, value in model.state_dict().items():
                shadow[name] = value.clone() if step == 1 else torch.lerp(shadow[name], value, 0.5)
        assert client.stats()["offered"] == 10

    with Reader(server.http) as reader:
        raw = load_file(reader.download(reader.version(run, "raw"), tmp_path / "raw") / "model.safetensors")
        ema = load_file(reader.download(reader.version(run, "ema-0.5"), tmp_path / "ema") / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(raw[name], value), name
        torch.testing.assert_close(ema[name], shadow[name], rtol=1e-6, atol=1e-6)


def to_another_dtype(model: Reassigning) -> None:
    model.to(torch.float64)


def add_a_parameter(model: Reassigning) -> None:
    model.linear.scale = nn.Parameter(torch.ones(4))


def replace_by_another_shape(model: Reassigning) -> None:
    model.seen = torch.zeros(1, 4)


def remove_a_parameter(model: Reassigning) -> None:
    model.linear.register_parameter("bias", None)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (to_another_dtype, "'seen'"),
        (add_a_parameter, "'linear.scale'"),
        (replace_by_another_shape, "'seen'"),
        (remove_a_parameter, "'linear.bias'"),
    ],
)
def test_other_tensors_are_refused_by_name_and_the_run_is_kept(
    server: ServerProcess, run: str, tmp_path: Path, change: Callable[[Reassigning], None], names: str
) -> None:
    model = Reassigning()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    client = EmaClient(server.zmq, run, ["raw"], when_behind="wait", on_change="raise")
    client.attach(model, optimizer)
    for _ in range(3):
        train(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(model)
    with pytest.raises(PlanError, match="the model has changed") as caught:
        client.update(model)
    assert names in str(caught.value)
    assert client.flush(WAIT_S, durable=True)
    client.close()

    with Reader(server.http) as reader:
        version = reader.version(run, "raw")
        found = load_file(reader.download(version, tmp_path / "raw") / "model.safetensors")
    assert version.step == 3
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_restored_model_is_streamed_again(server: ServerProcess, run: str) -> None:
    model = Reassigning()
    with EmaClient(server.zmq, run, ["raw"], when_behind="wait", on_change="raise") as client:
        client.update(model, 1)
        with pytest.raises(PlanError, match="the model has changed"):
            client.update(model.half(), 2)
        client.update(model.float(), 3)
        assert client.flush(WAIT_S)
        assert client.stats()["last_committed_step"] == 3


class Many(nn.Module):
    """A number of parameters of three values each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.few = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(count)])

    def at(self, step: int) -> Many:
        with torch.no_grad():
            torch._foreach_zero_(list(self.parameters()))
            torch._foreach_add_(list(self.parameters()), float(step))
        return self


def memory_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) << 10


def stream(server: ServerProcess, run: str, model: Many) -> float:
    """Five steps and the end of the run; returns the CPU seconds of this process, per tensor."""
    started = time.process_time()
    with EmaClient(server.zmq, run, ["ema:0.5", "raw"], when_behind="wait", connect_timeout_s=WAIT_S) as client:
        for step in range(1, 6):
            client.update(model.at(step), step)
        assert client.flush(WAIT_S)
        assert client.stats()["committed"] == 5
    return (time.process_time() - started) / len(model.few)


def test_many_small_tensors_cost_linear_time_and_memory(server: ServerProcess, tmp_path: Path) -> None:
    few_s = stream(server, "few", Many(5_000))
    before_bytes = memory_bytes(server.popen.pid)
    many_s = stream(server, "many", Many(50_000))
    grown_bytes = memory_bytes(server.popen.pid) - before_bytes

    assert many_s < 3 * few_s, "per tensor; work that grows with the square would be ten times as much"
    assert grown_bytes < 50_000 * 8_000, "a few kilobytes per tensor: its name, spec and places, while it joins"
    with Reader(server.http) as reader:
        folder = reader.download(reader.version("many", "ema-0.5"), tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert len(found) == 50_000
    expected = 1 / 16 + 2 / 16 + 3 / 8 + 4 / 4 + 5 / 2
    assert all(value.tolist() == [expected] * 3 for value in found.values())


def test_refusal_of_many_tensors_names_only_a_few(server: ServerProcess) -> None:
    model = Many(50_000)
    with EmaClient(server.zmq, "unclean", ["raw"], when_behind="wait", connect_timeout_s=WAIT_S) as client:
        client.update(model.at(1), 1)
        client.update(model.at(2), 2)
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), torch.nan)
        client.update(model, 3)
        assert not client.flush(WAIT_S), "step 3 is not applied"
        status = server.get("/v1/runs/unclean")

    assert (status["step"], status["quarantined"], len(status["quarantine"]["tensors"])) == (2, 1, 100)
    assert "in 50000 tensors" in status["quarantine"]["text"]
