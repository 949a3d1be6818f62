"""`EmaCallback` in real trainings by Hugging Face's Trainer: what is averaged, resumed, logged and refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from ema_reader import Reader, Version
from support.command import ema
from support.hf_training import AVERAGES, DECAY, Recorder, arguments, recorded, samples, tiny_bert, trainer_of
from support.oracle import bound, largest_difference, ledger_steps, replay
from support.processes import SUPPORT, Process, ServerProcess
from support.waiting import eventually
from trainer_client import ConnectError, PlanError, SettingsError
from trainer_client.transformers import EmaCallback

_EXAMPLES = Path(__file__).parents[2] / "examples"
_SCRIPT = str(SUPPORT / "hf_training.py")
_WAIT_S = 100.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server"), "--publish-min-seconds", "0") as process:
        yield process


@pytest.fixture
def reader(server: ServerProcess) -> Iterator[Reader]:
    with Reader(server.http) as reader:
        yield reader


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).replace("[", "-").replace("]", "")[:60].strip("-_")


def _callback(server: ServerProcess, run: str, **others: Any) -> EmaCallback:
    return EmaCallback(server.zmq, run, AVERAGES, **({"when_behind": "wait"} | others))


def _check_replayed(
    reader: Reader, run: str, weights: Callable[[int], dict[str, Tensor]], steps: list[int], folder: Path
) -> None:
    """The average is that of the weights at these steps, and `raw` the weights at the last of them."""
    ledger = _ledger(reader, reader.version(run, "ema"), folder)
    assert ledger_steps(ledger) == steps
    largest = max(value.abs().max().item() for step in steps for value in weights(step).values())
    found = reader.load(f"{run}/ema")
    assert largest_difference(found, replay(ledger, DECAY, weights)) <= bound(ledger, DECAY, largest)
    assert largest_difference(reader.load(f"{run}/raw"), weights(steps[-1])) == 0.0


def _ledger(reader: Reader, version: Version, folder: Path) -> Any:
    return json.loads((reader.download(version, folder / version.id) / "version.json").read_text())["ledger"]


def _steps_of(reader: Reader, run: str) -> list[int]:
    return sorted(version.step for version in reader.versions(run, "ema"))


def test_averages_equal_a_float64_replay_of_the_weights_after_each_step(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    given = arguments(tmp_path, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer_of(_callback(server, run), given, recorder).train()

    assert reader.run(run).finished
    assert list(recorder.weights) == list(range(1, 17))  # 64 samples, 8 in each step
    _check_replayed(reader, run, recorder.at, list(range(1, 17)), tmp_path)


def test_a_downloaded_average_is_loaded_by_from_pretrained(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    trainer_of(_callback(server, run), arguments(tmp_path, max_steps=3)).train()

    folder = reader.download(f"{run}/ema", tmp_path / "average")
    model = BertForSequenceClassification.from_pretrained(folder)
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert largest_difference(model.state_dict(), reader.load(f"{run}/ema")) == 0.0


class _Overflow(TrainerCallback):
    """Gives step `step` a gradient that overflows, under a gradient scaler."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **others: Any) -> None:
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        optimizer.scaler.scale(torch.zeros(1))
        optimizer.__setstate__({})  # it remembers the step that it is to call

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        if state.global_step + 1 == self._step:
            next(model.parameters()).grad.fill_(math.inf)


def test_a_step_that_the_gradient_scaler_skips_is_counted_and_not_sent(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder, callback = Recorder(), _callback(server, run)
    given = arguments(tmp_path, max_steps=6, optim="adamw_torch", max_grad_norm=0.0)
    trainer_of(callback, given, recorder, _Overflow(3)).train()

    assert largest_difference(recorder.at(3), recorder.at(2)) == 0.0
    assert callback.client.steps == 6
    _check_replayed(reader, run, recorder.at, [1, 2, 4, 5, 6], tmp_path)


def test_steps_that_no_hook_of_the_optimizer_sees_are_sent(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    class StepsByHand(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **others: Any) -> None:
            def step() -> None:
                with torch.no_grad():
                    for group in optimizer.param_groups:
                        for parameter in group["params"]:
                            parameter.sub_(parameter.grad, alpha=0.1)

            optimizer.step = step

    recorder = Recorder()
    trainer_of(_callback(server, run), arguments(tmp_path, max_steps=4), recorder, StepsByHand()).train()

    assert largest_difference(recorder.at(3), recorder.at(4)) > 0.0
    _check_replayed(reader, run, recorder.at, [1, 2, 3, 4], tmp_path)


def test_a_killed_training_that_resumes_gives_the_averages_of_an_uninterrupted_one(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    whole, threads = Recorder(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child processes: with more threads sums are rounded in another order
    try:
        trainer_of(_callback(server, f"{run}-whole"), arguments(tmp_path / "whole", max_steps=20), whole).train()
    finally:
        torch.set_num_threads(threads)

    saving = ('save_strategy="steps"', "save_steps=5")
    with Process(_SCRIPT, server.zmq, run, str(tmp_path), "20", *saving, "kill_at=13") as killed:
        killed.wait(_WAIT_S)
    assert killed.popen.returncode == -9, list(killed.errors)
    with Process(_SCRIPT, server.zmq, run, str(tmp_path), "20", *saving) as resumed:
        assert resumed.wait(_WAIT_S) == 0, list(resumed.errors)

    assert json.loads(resumed.lines[-1])["first"] == 11
    assert reader.run(run).gap_steps == 0
    for average in ("raw", "ema"):
        one, other = (reader.load(f"{each}/{average}") for each in (f"{run}-whole", run))
        assert largest_difference(one, other) == 0.0
    _check_replayed(reader, f"{run}-whole", whole.at, list(range(1, 21)), tmp_path)


def test_a_resumed_training_finds_a_generated_name_in_its_checkpoint(
    server: ServerProcess, reader: Reader, tmp_path: Path
) -> None:
    given = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    first, second = (EmaCallback(server.zmq, when_behind="wait") for _ in range(2))
    trainer_of(first, given).train()
    given.max_steps = 6
    trainer_of(second, given).train(resume_from_checkpoint=True)

    assert second.client.run == first.client.run
    assert (reader.run(first.client.run).step, reader.run(first.client.run).gap_steps) == (6, 0)


class _Unsavable:
    def save_pretrained(self, folder: str) -> None:
        raise RuntimeError(f"nothing can be written to {folder}")


def test_a_model_that_is_not_of_transformers_is_averaged_without_a_config(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = tiny_bert()
            self.config = self.bert.config

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.bert(input_ids=input_ids, labels=labels)

    recorder = Recorder()
    trainer = Trainer(Wrapped(), arguments(tmp_path, max_steps=3), train_dataset=samples(), callbacks=[recorder])
    trainer.add_callback(_callback(server, run))
    trainer.callback_handler.processing_class = _Unsavable()
    trainer.train()

    _check_replayed(reader, run, recorder.at, [1, 2, 3], tmp_path)
    assert reader.version(run, "ema").file("config.json") is None
    assert "without the files of _Unsavable: RuntimeError" in caplog.text


def test_every_checkpoint_has_averages_of_its_step(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    given = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=4, save_only_model=True)
    trainer = trainer_of(_callback(server, run), given)
    trainer.train()

    assert {4, 8, 9} <= set(_steps_of(reader, run))
    checkpoint = tmp_path / "trainer" / "checkpoint-4"
    trainer_of(_callback(server, run), given).train(resume_from_checkpoint=str(checkpoint))
    assert (reader.run(run).step, reader.run(run).gap_steps) == (9, 0)


def test_a_resumed_training_that_had_no_callback_begins_a_run_at_its_step(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    given = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = trainer_of(_callback(server, f"{run}-unused"), given)
    trainer.remove_callback(EmaCallback)
    trainer.train()

    recorder = Recorder()
    given.max_steps = 8
    trainer_of(_callback(server, run), given, recorder).train(resume_from_checkpoint=True)
    _check_replayed(reader, run, recorder.at, [5, 6, 7, 8], tmp_path)


def test_a_callback_is_not_replaced_where_the_states_of_callbacks_are_restored(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    given = arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=True
    )
    trainer_of(_callback(server, run), given).train()

    given.max_steps = 6
    callback = _callback(server, run)
    trainer = trainer_of(callback, given)
    trainer.train(resume_from_checkpoint=True)
    assert callback in trainer.callback_handler.callbacks
    assert callback.client.steps == 6
    assert (reader.run(run).step, reader.run(run).gap_steps) == (6, 0)


def test_a_second_training_begins_a_new_run_and_one_that_resumes_continues(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    given = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    trainer = trainer_of(_callback(server, run), given, recorder)
    trainer.train()
    trainer.train()

    earlier = [each for each in reader.runs() if each.run.startswith(f"{run}.")]
    assert [each.step for each in (*earlier, reader.run(run))] == [4, 4]
    assert largest_difference(reader.load(f"{run}/raw"), recorder.at(4)) == 0.0

    given.max_steps = 10
    trainer.train(resume_from_checkpoint=True)
    assert reader.run(run).finished
    _check_replayed(reader, run, recorder.at, list(range(1, 11)), tmp_path)


def test_a_smaller_batch_size_after_running_out_of_memory_begins_a_new_run(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    attempts: list[int] = []

    def fail_once(step: int) -> None:
        if step == 2 and not attempts:
            attempts.append(step)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    recorder = Recorder(fail_once)
    given = arguments(tmp_path, max_steps=4, auto_find_batch_size=True)
    trainer_of(_callback(server, run), given, recorder).train()

    assert attempts == [2]
    _check_replayed(reader, run, recorder.at, [1, 2, 3, 4], tmp_path)
    earlier = next(each for each in reader.runs() if each.run.startswith(f"{run}."))
    assert earlier.state != "finished"


def test_a_compiled_model_has_the_names_of_the_model_inside(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    given = arguments(tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    trainer = trainer_of(_callback(server, run), given, recorder)
    trainer.train()

    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert reader.load(f"{run}/raw").keys() == tiny_bert().state_dict().keys()
    _check_replayed(reader, run, recorder.at, [1, 2], tmp_path)


class _Search(TrainerCallback):
    """Says that each training is a trial, as `hyperparameter_search` does with `hp_name`."""

    def __init__(self) -> None:
        self._trials = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._trials += 1
        state.is_hyper_param_search, state.trial_name = True, f"lr={self._trials}e-3, wd=0."


def test_each_trial_of_a_search_is_a_run(server: ServerProcess, reader: Reader, tmp_path: Path) -> None:
    callback = EmaCallback(server.zmq, when_behind="wait")
    generated = callback.client.run
    trainer = trainer_of(callback, arguments(tmp_path, max_steps=3), _Search())
    trainer.train()
    trainer.train()

    for trial in (1, 2):
        run = reader.run(f"{generated}-lr-{trial}e-3-wd-0")
        assert (run.state, run.step) == ("finished", 3)


def test_the_last_weights_are_those_of_the_last_step_where_the_best_model_is_loaded(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The loss falls, so that the first checkpoint has the highest.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(_callback(server, run), arguments(tmp_path, max_steps=12, **schedule, **best), recorder)
    trainer.train()

    assert trainer.state.best_global_step < 12
    assert largest_difference(trainer.model.state_dict(), recorder.at(12)) > 0.0
    assert largest_difference(reader.load(f"{run}/raw"), recorder.at(12)) == 0.0


def test_a_training_that_stops_early_finishes_the_run(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    given = arguments(tmp_path, max_steps=40, eval_on_start=True, **schedule, **best)
    trainer_of(_callback(server, run), given, recorder, EarlyStoppingCallback(2)).train()

    last = max(recorder.weights)
    assert last < 40
    assert (reader.run(run).state, reader.run(run).step) == ("finished", last)
    _check_replayed(reader, run, recorder.at, list(range(1, last + 1)), tmp_path)


def test_a_training_that_raises_leaves_the_run_open_for_the_next_one(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    def fail(step: int) -> None:
        if step == 7:
            raise RuntimeError("a bad batch")

    recorder = Recorder(fail)
    given = arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=3)
    trainer = trainer_of(_callback(server, run), given, recorder)
    with pytest.raises(RuntimeError, match="a bad batch"):
        trainer.train()
    assert reader.run(run).state == "active"

    trainer.remove_callback(recorder)
    trainer.add_callback(recorder := Recorder())
    trainer.train(resume_from_checkpoint=True)
    assert (reader.run(run).step, reader.run(run).gap_steps) == (10, 0)
    assert min(recorder.weights) == 7


class _Evaluator(TrainerCallback):
    """Reports a score of every version at a checkpoint, as a worker does; keeps what trackers are given."""

    def __init__(self, reader: Reader, run: str) -> None:
        self._reader = reader
        self._run = run
        self.logs: list[dict[str, Any]] = []

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for average in ("raw", "ema"):
            version = self._reader.version(self._run, average, f"step-{state.global_step}")
            self._reader.report(version, {"accuracy": state.global_step / 100 + len(average) / 10})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("tracked", [True, False])
def test_scores_of_every_average_are_logged_once(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path, tracked: bool
) -> None:
    evaluator = _Evaluator(reader, run)
    schedule = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    callback = _callback(server, run, url=server.http, scores_timeout_s=30.0)
    trainer = trainer_of(callback, arguments(tmp_path, max_steps=20, **schedule))
    callback._trainer = trainer if tracked else None
    trainer.add_callback(evaluator)
    trainer.train()

    entries = [entry for entry in trainer.state.log_history if "eval_averages_step" in entry]
    found = [
        (entry["eval_averages_step"], name.removeprefix("eval_"), round(value, 6))
        for entry in entries
        for name, value in entry.items()
        if name.endswith("_accuracy")
    ]
    assert sorted(found) == [
        (10, "ema_accuracy", 0.4),
        (10, "raw_accuracy", 0.4),
        (20, "ema_accuracy", 0.5),
        (20, "raw_accuracy", 0.5),
    ]
    assert all({"epoch", "step"} <= entry.keys() for entry in entries)
    trainer.create_model_card()  # it reads the log
    shown = [logs for logs in evaluator.logs if "eval_averages_step" in logs]
    assert len(shown) == (len(entries) if tracked else 0)


def test_scores_of_before_a_resume_are_not_logged_again(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    given = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = trainer_of(_callback(server, run), given)
    trainer.add_callback(_Evaluator(reader, run))
    trainer.train()
    given.max_steps = 6
    callback = _callback(server, run, url=server.http, scores_timeout_s=30.0)
    trainer = trainer_of(callback, given)
    trainer.add_callback(_Waiter(callback))
    trainer.add_callback(_Evaluator(reader, run))
    trainer.train(resume_from_checkpoint=True)

    steps = {entry["eval_averages_step"] for entry in trainer.state.log_history if "eval_averages_step" in entry}
    assert steps == {6}


def test_scores_that_do_not_arrive_in_time_are_reported(
    server: ServerProcess, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = _callback(server, run, url=server.http, scores_timeout_s=0.5)
    trainer_of(callback, arguments(tmp_path, max_steps=2)).train()

    assert f"run {run}: after 0.5 s not every average has a score at step 2 on {server.http}" in caplog.text


class _Waiter(TrainerCallback):
    """Waits at the beginning until the scores that are there already have been read."""

    def __init__(self, callback: EmaCallback) -> None:
        self._callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        scores = self._callback._scores
        assert scores is not None
        eventually(lambda: not scores._skip, "the first read of the scores")


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_rank_0_streams_the_weights_of_two_ranks(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path, launcher: str
) -> None:
    launch = {
        "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        "accelerate": (
            # Starts two processes, which run on the CPU: TrainingArguments says so.
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
            *("--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"),
        ),
    }[launcher]
    saving = ('save_strategy="steps"', "save_steps=4", 'ddp_backend="gloo"')
    with Process(*launch, _SCRIPT, server.zmq, run, str(tmp_path), "6", *saving) as ranks:
        assert ranks.wait(_WAIT_S) == 0, list(ranks.errors)
    printed = json.loads(next(line for line in ranks.lines if line.startswith("{") and "world" in line))

    assert printed["world"] == 2
    _check_replayed(reader, run, recorded(tmp_path), list(range(1, 7)), tmp_path)
    assert {4, 6} <= set(_steps_of(reader, run))


def test_every_rank_streams_its_shards_with_fsdp_2_and_a_killed_training_resumes(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", _SCRIPT, server.zmq, run)
    given = ['save_strategy="steps"', "save_steps=3", 'ddp_backend="gloo"', "sharded=true"]
    given += ['eval_strategy="steps"', "eval_steps=2", "eval_on_start=true"]  # evaluations leave parameters gathered
    for is_killed in (True, False):
        more = ["kill_at=5"] if is_killed else []
        with Process(*launch, str(tmp_path), "8", *given, *more) as ranks:
            assert (ranks.wait(_WAIT_S) != 0) == is_killed, list(ranks.errors)

    assert json.loads(next(line for line in ranks.lines if line.startswith("{") and "world" in line))["first"] == 4
    _check_replayed(reader, run, recorded(tmp_path), list(range(1, 9)), tmp_path)
    assert {3, 6, 8} <= set(_steps_of(reader, run))
    config = json.loads(
        reader.download(reader.version(run, "ema"), tmp_path / "ema").joinpath("config.json").read_text()
    )
    assert config["architectures"] == ["BertForSequenceClassification"]
    shown = reader.run(run)
    assert shown.ranks is not None
    assert (shown.state, shown.gap_steps, shown.ranks.world, shown.ranks.dropped_steps) == ("finished", 0, 2, 0)


def test_ranks_of_fsdp_2_must_know_the_run(server: ServerProcess, tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", _SCRIPT, server.zmq, "")
    with Process(*launch, str(tmp_path), "2", 'ddp_backend="gloo"', "sharded=true") as ranks:
        assert ranks.wait(_WAIT_S) != 0
    assert any("SettingsError: the ranks of a sharded model must know the run" in line for line in ranks.errors)
    assert not any("JoinError" in line for line in ranks.errors), "no rank has waited for the others"


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_training_is_refused_by_name_before_its_first_step(
    server: ServerProcess, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType
) -> None:
    recorder = Recorder()

    class Pretend(TrainerCallback):
        def on_train_begin(self, *_: Any, **others: Any) -> None:
            monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)

    trainer = trainer_of(_callback(server, run), arguments(tmp_path, max_steps=2), recorder, Pretend())
    with pytest.raises(PlanError, match=r"(FSDP|DeepSpeed|Megatron-LM) .*: train with DDP"):
        trainer.train()
    assert recorder.weights == {}


def test_a_server_that_goes_away_neither_stops_nor_holds_up_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ServerProcess(tmp_path / "data") as server:
        recorder = Recorder(lambda step: server.kill() if step == 5 else None)
        callback = EmaCallback(server.zmq, "gone", url=server.http, timeout_s=5.0)
        given = arguments(tmp_path, max_steps=60, save_strategy="steps", save_steps=5)
        trainer = trainer_of(callback, given, recorder)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began

        trainer.train()  # a second training does not begin with an error either

    assert max(recorder.weights) == 60
    assert seconds < 50.0  # a wait at each of 12 checkpoints would be longer
    assert "no checkpoint at step" in caplog.text
    assert "this training is not averaged" in caplog.text


def test_what_cannot_be_used_is_refused_where_the_callback_is_made(server: ServerProcess) -> None:
    with pytest.raises(ConnectError, match="nothing listens"):
        EmaCallback("tcp://127.0.0.1:1", connect_timeout_s=0.5)
    with pytest.raises(SettingsError, match="step=7 is not for a callback"):
        EmaCallback(server.zmq, step=7)
    with pytest.raises(SettingsError, match="rank=0 is not for a callback"):
        EmaCallback(server.zmq, rank=0)
    with pytest.raises(SettingsError, match="is not an average"):
        EmaCallback(server.zmq, averages=[0.999])  # type: ignore[list-item]
    with pytest.raises(SettingsError, match="ftp"):
        EmaCallback(server.zmq, url="ftp://127.0.0.1")


def test_averages_in_samples_and_epochs_need_no_number(
    server: ServerProcess, reader: Reader, run: str, tmp_path: Path
) -> None:
    rules = ["ema:half_life_epochs=1,name=epochs", "ema:half_life_samples=64,name=samples"]
    callback = EmaCallback(server.zmq, run, rules, when_behind="wait")
    trainer_of(callback, arguments(tmp_path, max_steps=9, gradient_accumulation_steps=2)).train()

    half_lives = {average.name: average.half_life_steps for average in reader.run(run).averages}
    assert half_lives == {"epochs": pytest.approx(8.0), "samples": pytest.approx(8.0)}


def test_the_example_trains_and_its_versions_are_evaluated(
    server: ServerProcess, reader: Reader, tmp_path: Path
) -> None:
    script = (_EXAMPLES / "train_transformers.py").read_text()
    for printed, here in (
        ("tcp://127.0.0.1:5555", server.zmq),
        ("http://127.0.0.1:8080", server.http),
        ("STEPS = 600", "STEPS = 12"),
        ('        "char-model",\n', f"        {str(tmp_path)!r},\n"),
        ("scores_timeout_s=60.0", 'when_behind="wait"'),
    ):
        assert script.count(printed) == 1
        script = script.replace(printed, here)
    with Process("-c", script) as trainer:
        assert trainer.wait(_WAIT_S) == 0, list(trainer.errors)
    evaluated = ema(
        *("evaluate", "train_transformers:held_out_loss", "--run", "char-model", "--url", server.http), cwd=_EXAMPLES
    )

    assert evaluated.returncode == 0, evaluated.stderr
    scores = {row.average: row.metrics["loss"] for row in reader.metrics("char-model") if row.step == 12}
    assert scores.keys() == {"raw", "ema-0.98", "ema-0.99"}
    assert all(2.0 < loss < 5.0 for loss in scores.values())  # log(128) is 4.85
