"""Accelerate: what is streamed after `prepare`, checkpoints, several processes, and what is refused."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from support.fake_worker import OfflineClient
from support.processes import SUPPORT, Process, ServerProcess
from support.recorded import Recorder, ledger_of
from trainer_client import EmaClient, RewindError, SettingsError
from trainer_client.steps.hooks import Attachment, Listener
from trainer_client.steps.optimizers import steppers_of

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import find_executable_batch_size
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

_EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_digits.py"
_ACCUMULATED = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("accelerate") / "data") as process:
        yield process


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A script that trains with Accelerate; the weights after each real step are recorded."""

    def __init__(self, **given: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=_ACCUMULATED, **given)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 2)), 4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def run(self, steps: int, ema: EmaClient, recorder: Recorder) -> None:
        while steps:
            for inputs, targets in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(mse_loss(self.model(inputs), targets))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            recorder.record(ema.steps, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            steps -= 1

    def checkpointed(self, ema: EmaClient) -> None:
        self.accelerator.register_for_checkpointing(ema)
        self.accelerator.register_save_state_pre_hook(lambda *_: ema.checkpoint(ema.steps))


def _client(server: ServerProcess, run: str | None, **given: Any) -> EmaClient:
    return EmaClient(server.zmq, run, ["raw", "ema:0.9"], when_behind="wait", **given)


@pytest.mark.parametrize("given", [{}, {"mixed_precision": "bf16"}, {"dynamo_backend": "eager"}], ids=str)
def test_accumulated_steps_give_the_averages_of_a_float64_replay(server: ServerProcess, given: dict[str, Any]) -> None:
    training, recorder = Training(**given), Recorder()
    ema = _client(server, "-".join(["accumulated", *given]))
    ema.attach(training.model, training.optimizer)
    training.run(7, ema, recorder)

    assert ema.finish()
    recorder.check(server, ema.run, list(range(1, 8)))


@pytest.mark.parametrize("registered", ["before attach", "after attach"])
@pytest.mark.parametrize("named", [True, False], ids=["run given", "run generated"])
def test_a_new_process_that_loads_the_state_before_attach_continues_the_run(
    server: ServerProcess, tmp_path: Path, registered: str, named: bool
) -> None:
    run = f"continued-{registered[0]}" if named else None
    recorder = Recorder()
    first = Training()
    ema = _client(server, run)
    if registered == "before attach":
        first.checkpointed(ema)
    ema.attach(first.model, first.optimizer)
    if registered == "after attach":
        first.checkpointed(ema)
    first.run(4, ema, recorder)
    first.accelerator.save_state(str(tmp_path))
    first.run(2, ema, recorder)
    ema.close()
    name = ema.run
    AcceleratorState._reset_state(reset_partial_state=True)

    second = Training()
    ema = _client(server, run)
    second.checkpointed(ema)
    second.accelerator.load_state(str(tmp_path))
    assert (ema.run, ema.steps) == (name, 4)
    ema.attach(second.model, second.optimizer)
    second.run(3, ema, recorder)

    assert ema.finish()
    recorder.check(server, name, list(range(1, 8)))


def test_state_loaded_while_attached_takes_the_run_back(server: ServerProcess, tmp_path: Path) -> None:
    training, recorder = Training(), Recorder()
    ema = _client(server, "taken-back")
    training.checkpointed(ema)
    ema.attach(training.model, training.optimizer)
    training.run(3, ema, recorder)
    training.accelerator.save_state(str(tmp_path))
    training.run(3, ema, recorder)
    training.accelerator.load_state(str(tmp_path))
    assert ema.steps == 3
    training.run(2, ema, recorder)

    assert ema.finish()
    recorder.check(server, ema.run, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as before prepare()"])
def test_both_the_prepared_objects_and_those_inside_can_be_attached(prepared: bool) -> None:
    training = Training()
    client = OfflineClient("tcp://127.0.0.1:5555", run="r")
    inside = (training.accelerator.unwrap_model(training.model), training.optimizer.optimizer)
    client.attach(*((training.model, training.optimizer) if prepared else inside))
    training.run(2, client, Recorder())

    assert client.worker.steps == [1, 2]
    assert client.worker.sent(-1).keys() == inside[0].state_dict().keys()


def test_each_attempt_of_find_executable_batch_size_begins_a_run(server: ServerProcess) -> None:
    def train(batch_size: int) -> bool:
        training = Training()
        ema = _client(server, "attempts")
        ema.attach(training.model, training.optimizer)
        training.run(batch_size, ema, recorder)
        if batch_size > 1:
            raise RuntimeError("CUDA out of memory.")
        return ema.finish()

    recorder = Recorder()
    assert find_executable_batch_size(train, starting_batch_size=4)()
    recorder.check(server, "attempts", [1])


def test_state_loaded_after_attach_in_a_new_process_is_an_error_that_says_how_to_continue(
    server: ServerProcess, tmp_path: Path
) -> None:
    recorder = Recorder()
    first = Training()
    ema = _client(server, "order")
    first.checkpointed(ema)
    ema.attach(first.model, first.optimizer)
    first.run(2, ema, recorder)
    first.accelerator.save_state(str(tmp_path))
    ema.close()
    AcceleratorState._reset_state(reset_partial_state=True)

    second = Training()
    ema = _client(server, "order")
    second.checkpointed(ema)
    ema.attach(second.model, second.optimizer)
    with pytest.raises(RewindError, match=r"before attach\(\); .* kept as (order\.\w+), pass that as run=") as error:
        second.accelerator.load_state(str(tmp_path))
    ema.close()
    AcceleratorState._reset_state(reset_partial_state=True)

    kept = re.findall(r"kept as ([\w.]+)", str(error.value))[0]
    third = Training()
    ema = _client(server, kept)
    third.checkpointed(ema)
    third.accelerator.load_state(str(tmp_path))
    ema.attach(third.model, third.optimizer)
    third.run(2, ema, recorder)

    assert ema.finish()
    recorder.check(server, kept, [1, 2, 3, 4])


def test_steps_that_the_scaler_skips_are_not_counted(server: ServerProcess) -> None:
    training, recorder = Training(), Recorder()
    optimizer = AcceleratedOptimizer(training.optimizer.optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    ema = _client(server, "skipped")
    ema.attach(training.model, optimizer)
    skipped = []
    for overflows in (False, True, False, False):
        loss: Tensor = optimizer.scaler.scale(training.model(torch.ones(3, 4)).square().sum())
        loss.backward()
        if overflows:
            next(training.model.parameters()).grad.fill_(float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
        if not overflows:
            recorder.record(ema.steps, training.model)

    assert skipped == [False, True, False, False]
    assert ema.finish()
    recorder.check(server, ema.run, [1, 2, 3])


def test_batches_that_only_accumulate_do_not_hold_back_a_copy() -> None:
    training, held_back = Training(), list[int]()
    steppers = steppers_of(training.optimizer)
    handle = Attachment(training.model, steppers, Listener(before_write=lambda _: held_back.append(1)))
    training.run(2, OfflineClient("tcp://127.0.0.1:5555", run="r"), Recorder())
    handle.remove()

    assert len(held_back) == 2


def test_attached_optimizer_can_be_saved_as_an_object() -> None:
    training = Training()
    client = OfflineClient("tcp://127.0.0.1:5555", run="r")
    client.attach(training.model, training.optimizer)

    file = io.BytesIO()
    torch.save(training.optimizer, file)
    file.seek(0)
    torch.load(file, weights_only=False).step()
    assert client.worker.steps == []

    training.optimizer.step()
    assert client.worker.steps == [1]


def test_optimizer_of_the_deepspeed_plugin_is_refused_with_the_call_to_make_instead() -> None:
    training = Training()
    client = OfflineClient("tcp://127.0.0.1:5555", run="r")

    with pytest.raises(SettingsError, match=r"DeepSpeedOptimizerWrapper .* call update\(model, step\)"):
        client.attach(training.model, DeepSpeedOptimizerWrapper(training.optimizer.optimizer))


def _script(server: ServerProcess, folder: Path, steps: int, *changes: tuple[str, str]) -> Path:
    """The example for this server, short, and with every step sent."""
    text = _EXAMPLE.read_text()
    here = [
        ("tcp://127.0.0.1:5555", server.zmq),
        ("STEPS = 2000", f"STEPS = {steps}"),
        ("SAVE_EVERY = 500", "SAVE_EVERY = 20"),
        ('Path("accelerate-digits")', f"Path({str(folder / 'state')!r})"),
        ('run="accelerate-digits"', f'run={folder.name!r}, when_behind="wait"'),
    ]
    for printed, value in (*here, *changes):
        assert text.count(printed) == 1
        text = text.replace(printed, value)
    script = folder / "accelerate_digits.py"
    script.write_text(text)
    return script


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
_LAUNCH = ("-m", "accelerate.commands.launch", "--cpu")


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [(_LAUNCH, 1), (_TORCHRUN, 2), ((*_TORCHRUN, *_LAUNCH), 2)],
    ids=["accelerate launch", "torchrun", "torchrun and accelerate launch"],
)
def test_example_trains_in_one_process_and_in_two(
    server: ServerProcess, tmp_path: Path, launcher: tuple[str, ...], processes: int
) -> None:
    script = _script(server, tmp_path, 30)
    with Process(*launcher, str(script), env={"ACCELERATE_USE_CPU": "true"}) as trainer:
        assert trainer.wait(200.0) == 0, list(trainer.errors)
    run = server.get(f"/v1/runs/{tmp_path.name}")

    printed = re.findall(r"process \d: \d+ steps, \d+ of them counted", "".join(trainer.lines))  # may share a line
    assert sorted(printed) == [f"process {rank}: 30 steps, 30 of them counted" for rank in range(processes)]
    assert (run["state"], run["step"], run["applied"]) == ("finished", 30, 30)


def test_ranks_of_fsdp2_stream_their_shards(server: ServerProcess, tmp_path: Path) -> None:
    arguments = (str(SUPPORT / "accelerate_sharded.py"), server.zmq, "fsdp2", str(tmp_path), "5")
    with Process(*_TORCHRUN, *arguments, env={"ACCELERATE_USE_CPU": "true"}) as ranks:
        assert ranks.wait(200.0) == 0, list(ranks.errors)
    recorder = Recorder()
    recorder.weights = {step: torch.load(tmp_path / f"step-{step}.pt") for step in range(1, 6)}

    assert server.get("/v1/runs/fsdp2")["state"] == "finished"
    recorder.check(server, "fsdp2", [1, 2, 3, 4, 5])


def test_example_that_is_killed_continues_from_its_state_with_the_averages_of_that_step(
    server: ServerProcess, tmp_path: Path
) -> None:
    killed = (
        "                optimizer.step()",
        "                optimizer.step(), step == 26 and os.kill(os.getpid(), 9)",
    )
    with Process(
        str(_script(server, tmp_path, 30, killed, ("import torch\n", "import os\nimport torch\n")))
    ) as trainer:
        assert trainer.wait() == -9, list(trainer.errors)
    with Process(str(_script(server, tmp_path, 30))) as trainer:
        assert trainer.wait() == 0, list(trainer.errors)
    run = server.get(f"/v1/runs/{tmp_path.name}")
    ledger = ledger_of(server, tmp_path.name, "ema-0.99")

    assert trainer.lines[0] == "continuing after step 20"
    assert (run["state"], run["step"], run["applied"], run["gap_steps"]) == ("finished", 30, 30, 0)
    assert ledger["ranges"] == [[1, 30, 1]]
