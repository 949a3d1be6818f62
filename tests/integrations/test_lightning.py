"""`EmaCallback` in trainings with the real Lightning, of both of its packages."""

from __future__ import annotations

import ast
import importlib
import json
import math
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.lightning_training import BATCHES, loader, module_class, recorder, replayed, trainer
from support.processes import SUPPORT, Process, ServerProcess

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")
torchmetrics = pytest.importorskip("torchmetrics")

from ema_reader import Reader  # noqa: E402
from ema_reader.scores import scores_of  # noqa: E402
from trainer_client import ConnectError, EmaClient, SettingsError  # noqa: E402
from trainer_client.connection.worker import Worker as SenderThread  # noqa: E402
from trainer_client.lightning import EmaCallback  # noqa: E402

_ONE = "lightning.pytorch"
_PACKAGES = (_ONE, "pytorch_lightning")
_DECAY = 0.8
_EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lightning.py"
_SCRIPT = str(SUPPORT / "lightning_trainer.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("data"), "--publish-min-seconds", "0") as process:
        yield process


@pytest.fixture(autouse=True)
def _address(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMA_ENDPOINT", server.zmq)
    monkeypatch.setenv("EMA_URL", server.http)
    monkeypatch.setenv("EMA_KERNEL", "torch")


@pytest.fixture
def reader(server: ServerProcess) -> Iterator[Reader]:
    with Reader(server.http) as reader:
        yield reader


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run's name that no other test uses."""
    return f"{request.node.originalname[len('test_') :][:40]}-{secrets.token_hex(4)}"


def callback(run: str, **arguments: Any) -> Any:
    """A callback that sends every step, and averages `net`."""
    usual: dict[str, Any] = {"decay": _DECAY, "module": "net", "when_behind": "wait"}
    return EmaCallback(run=run, **(usual | arguments))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name].double(), atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("package", _PACKAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_equals_a_replay_and_the_average_of_lightnings_own_callback(
    package: str, accumulate: int, run: str, reader: Reader, tmp_path: Path
) -> None:
    module, steps = module_class(package)(), recorder(package)
    theirs = importlib.import_module(f"{package}.callbacks").EMAWeightAveraging(decay=_DECAY)

    trainer(package, tmp_path, callback(run), steps, theirs, accumulate_grad_batches=accumulate).fit(module, loader())

    average = reader.load(f"{run}/ema")
    assert reader.run(run).step == len(steps.states) == 2 * BATCHES // accumulate
    assert reader.run(run).finished
    assert_close(average, replayed(steps.states, _DECAY))
    floats = {name: value for name, value in average.items() if value.is_floating_point()}
    # On train end it has written its average into the module.
    assert_close(floats, {name: module.net.state_dict()[name] for name in floats})


@pytest.mark.parametrize("package", _PACKAGES)
def test_training_is_bit_identical_to_one_without_the_callback(package: str, run: str, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [callback(run, validate=["ema", "raw"])]):
        module = module_class(package)()
        torch.manual_seed(7)
        trainer(package, tmp_path, *callbacks).fit(module, loader(shuffle=True), loader())
        ends.append(module.state_dict())

    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_validated_averages_are_logged_monitored_and_reported(run: str, reader: Reader, tmp_path: Path) -> None:
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="ema/val_loss")
    module, fitted = module_class(_ONE)(), None
    ema = callback(run, validate=["raw", "ema"])
    fitted = trainer(_ONE, tmp_path, checkpoint, ema, num_sanity_val_steps=2, enable_checkpointing=True)

    fitted.fit(module, loader(), loader())

    metrics = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert metrics["raw/val_loss"] == metrics["val_loss"]
    module.net.load_state_dict(reader.load(f"{run}/ema"))
    again = trainer(_ONE, tmp_path).validate(module, loader(), verbose=False)
    assert metrics["ema/val_loss"] == pytest.approx(again[0]["val_loss"], rel=1e-6)
    assert float(checkpoint.best_model_score) == pytest.approx(metrics["ema/val_loss"])
    reported = {(row.average, row.step): row.metrics for row in reader.metrics(run)}
    assert reported.keys() == {(average, step) for average in ("raw", "ema") for step in (BATCHES, 2 * BATCHES)}
    assert reported["ema", 2 * BATCHES] == {"val_loss": pytest.approx(metrics["ema/val_loss"])}


def test_fast_dev_run_leaves_the_run_as_it_is(run: str, reader: Reader, tmp_path: Path) -> None:
    trainer(_ONE, tmp_path, callback(run)).fit(module_class(_ONE)(), loader())
    before = reader.versions(run, "ema")

    trainer(_ONE, tmp_path, callback(run, validate="ema"), fast_dev_run=True).fit(
        module_class(_ONE)(), loader(), loader()
    )

    assert reader.versions(run, "ema") == before


def test_second_fit_continues_the_run(run: str, reader: Reader, tmp_path: Path) -> None:
    module, steps = module_class(_ONE)(), recorder(_ONE)
    fitted = trainer(_ONE, tmp_path, callback(run), steps, max_epochs=1)

    fitted.fit(module, loader())
    fitted.fit_loop.max_epochs = 2
    fitted.fit(module, loader())

    assert reader.run(run).finished
    assert len(steps.states) == 2 * BATCHES
    assert_close(reader.load(f"{run}/ema"), replayed(steps.states, _DECAY))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"decay": 0.9, "averages": ["raw"]}, "averages or decay"),
        ({"decay": 1.5}, r"decay=1\.5 cannot be used"),
        ({"decay": 0.9, "update_every_n_steps": 0}, "update_every_n_steps=0 is not between"),
        ({"update_starting_at_step": 3}, "update_starting_at_step needs decay="),
        ({"use_buffers": False}, "use_buffers needs decay="),
        ({"decay": 0.9, "update_starting_at_step": 3, "update_starting_at_epoch": 1}, "not both"),
        ({"averages": ["ema:2"]}, "decay 2"),
        ({"run": "a/b"}, "run name 'a/b'"),
        ({"decay": 0.9, "validate": "swa"}, "validate='swa' is no average of this run: use raw, ema"),
    ],
)
def test_wrong_argument_is_refused_by_the_constructor(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        EmaCallback(**arguments)


def test_unknown_argument_is_refused_by_the_constructor() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        EmaCallback(decay=0.9, device="cpu")


def test_checkpoint_after_a_validation_has_a_last_step_that_was_skipped(
    run: str, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ema = callback(run, when_behind="skip")
    acquire = SenderThread.acquire

    def no_slot_at_the_last_step(thread: SenderThread, wait_s: float, **options: Any) -> Any:
        is_last = ema._client.steps == BATCHES
        return (
            None if is_last and wait_s == 0 else acquire(thread, wait_s or 30.0, **options)
        )  # no earlier step is skipped

    monkeypatch.setattr(SenderThread, "acquire", no_slot_at_the_last_step)
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    fitted = trainer(_ONE, tmp_path, checkpoint, ema, enable_checkpointing=True, max_epochs=1)
    fitted.fit(module_class(_ONE)(), loader(), loader())

    assert reader.version(run, "ema", f"step-{BATCHES}").step == BATCHES
    assert "ema: step 8 was skipped" in caplog.text
    assert "no checkpoint" not in caplog.text


def test_score_that_never_arrives_does_not_end_the_training(run: str, reader: Reader, tmp_path: Path) -> None:
    stopping = lightning.callbacks.EarlyStopping("ema/accuracy", mode="max", patience=5)
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="raw/loss")
    fitted = trainer(_ONE, tmp_path, callback(run), stopping, checkpoint, enable_checkpointing=True)

    fitted.fit(module_class(_ONE)(), loader(), loader())

    assert reader.run(run).step == 2 * BATCHES
    assert math.isfinite(fitted.callback_metrics["ema/accuracy"])
    assert fitted.logged_metrics.keys() == {"val_loss"}


def test_training_that_was_killed_resumes_to_the_averages_of_its_steps(
    run: str, reader: Reader, tmp_path: Path
) -> None:
    with Process(_SCRIPT, str(tmp_path), run, "1", "5") as killed:
        assert killed.wait() == -signal.SIGKILL
    assert reader.run(run).step == 5  # two steps after the checkpoint

    with Process(_SCRIPT, str(tmp_path), run, "1") as resumed:
        assert resumed.wait() == 0, "\n".join(resumed.errors)

    states = [torch.load(tmp_path / f"step-{step}.pt") for step in range(1, 2 * BATCHES + 1)]
    assert reader.run(run).finished
    assert next(each for each in reader.run(run).averages if each.name == "ema").gap_steps == 0
    assert_close(reader.load(f"{run}/ema"), replayed([_float64(state) for state in states], _DECAY))


def test_rank_0_streams_and_all_ranks_have_the_scores(run: str, reader: Reader, tmp_path: Path) -> None:
    with Process(_SCRIPT, str(tmp_path), run, "2") as ranks:
        assert ranks.wait() == 0, "\n".join(ranks.errors)

    states = [torch.load(tmp_path / f"step-{step}.pt") for step in range(1, BATCHES + 1)]
    metrics = [json.loads((tmp_path / f"metrics-{rank}.json").read_text()) for rank in (0, 1)]
    assert_close(reader.load(f"{run}/ema"), replayed([_float64(state) for state in states], _DECAY))
    assert all(each.keys() == {"val_loss", "ema/val_loss", "raw/loss"} for each in metrics)
    assert metrics[0]["raw/loss"] == metrics[1]["raw/loss"] == pytest.approx(1e30)


def test_all_ranks_end_when_rank_0_cannot_join(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMA_ENDPOINT", "tcp://127.0.0.1:9")

    with Process(_SCRIPT, str(tmp_path), run, "2") as ranks:
        assert ranks.wait() == 1

    errors = "\n".join(ranks.errors)
    assert "EmaClientError: rank 0 has failed: " in errors
    assert "trainer_client.errors.ConnectError" in errors


def _float64(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items()}


def test_exception_leaves_the_run_open_with_the_averages_of_the_checkpoint(
    run: str, reader: Reader, tmp_path: Path
) -> None:
    module, steps = module_class(_ONE)(), recorder(_ONE)
    checkpoint = lightning.callbacks.OnExceptionCheckpoint(tmp_path, "crashed")
    crashing = trainer(_ONE, tmp_path, callback(run), steps, checkpoint, Failing(5), enable_checkpointing=True)

    with pytest.raises(ZeroDivisionError):
        crashing.fit(module, loader())

    assert not reader.run(run).finished
    trainer(_ONE, tmp_path, callback(run), steps).fit(module, loader(), ckpt_path=tmp_path / "crashed.ckpt")
    assert reader.run(run).finished
    assert len(steps.states) == 2 * BATCHES
    assert_close(reader.load(f"{run}/ema"), replayed(steps.states, _DECAY))


class Failing(lightning.Callback):  # type: ignore[name-defined]
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self._step:
            raise ZeroDivisionError


def test_new_training_sets_the_run_of_a_failed_one_aside(run: str, reader: Reader, tmp_path: Path) -> None:
    ema = callback(run)
    with pytest.raises(ZeroDivisionError):
        trainer(_ONE, tmp_path, ema, Failing(5)).fit(module_class(_ONE)(), loader())

    trainer(_ONE, tmp_path, ema, max_epochs=1).fit(module_class(_ONE)(), loader())

    assert reader.run(run).step == BATCHES
    assert {each.step for each in reader.runs() if each.run.startswith(run)} == {5, BATCHES}


def test_checkpoint_of_a_training_without_the_callback_gives_the_step(run: str, reader: Reader, tmp_path: Path) -> None:
    before = trainer(_ONE, tmp_path, max_epochs=1)
    before.fit(module_class(_ONE)(), loader())
    before.save_checkpoint(tmp_path / "before.ckpt")

    trainer(_ONE, tmp_path, callback(run)).fit(module_class(_ONE)(), loader(), ckpt_path=tmp_path / "before.ckpt")

    assert reader.run(run).step == 2 * BATCHES
    assert reader.run(run).applied == BATCHES


def test_checkpoint_that_is_only_validated_does_not_move_the_run(run: str, reader: Reader, tmp_path: Path) -> None:
    module, steps = module_class(_ONE)(), recorder(_ONE)
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fitted = trainer(_ONE, tmp_path, callback(run), steps, checkpoint, max_epochs=2, enable_checkpointing=True)
    fitted.fit(module, loader())

    fitted.validate(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    fitted.fit_loop.max_epochs = 3
    fitted.fit(module, loader())

    assert_close(reader.load(f"{run}/ema"), replayed(steps.states, _DECAY))


def test_networks_of_a_gan_are_averaged_by_a_callback_each(run: str, reader: Reader, tmp_path: Path) -> None:
    module = gan()
    recorders = [recorder(_ONE, "generator"), recorder(_ONE, "critic")]
    callbacks = [
        callback(f"{run}-g", module="generator", validate="ema"),
        callback(f"{run}-c", module="critic"),
    ]
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}")

    trainer(_ONE, tmp_path, *callbacks, *recorders, checkpoint, enable_checkpointing=True).fit(module, loader())

    # Three steps of the critic for one of the generator; global_step counts both.
    assert reader.run(f"{run}-g").step == 2 * BATCHES
    assert reader.run(f"{run}-c").step == 3 * 2 * BATCHES
    assert_close(reader.load(f"{run}-g/ema"), replayed(recorders[0].states, _DECAY))


def gan() -> Any:
    class Gan(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            critic, generator = self.optimizers()
            for _ in range(3):
                loss = self.critic(batch[0]).mean() - self.critic(self.generator(batch[0]).detach()).mean()
                critic.zero_grad()
                self.manual_backward(loss)
                critic.step()
            generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(batch[0])).mean())
            generator.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.critic, self.generator)]

    return Gan()


@pytest.mark.parametrize("compiled", ["module", "module in place", "network"])
def test_validated_average_is_that_of_a_compiled_model(compiled: str, run: str, reader: Reader, tmp_path: Path) -> None:
    module = module_class(_ONE)()
    fitted = trainer(_ONE, tmp_path, callback(run, validate="ema"))
    if compiled == "network":
        module.net = torch.compile(module.net, backend="eager")
        fitted.fit(module, loader(), loader())
        module.net = module.net._orig_mod
    elif compiled == "module in place":
        module.compile(backend="eager")
        fitted.fit(module, loader(), loader())
        module._compiled_call_impl = None
    else:
        fitted.fit(torch.compile(module, backend="eager"), loader(), loader())

    average = reader.load(f"{run}/ema")
    assert "0.weight" in average
    module.net.load_state_dict(average)
    again = trainer(_ONE, tmp_path).validate(module, loader(), verbose=False)
    assert float(fitted.callback_metrics["ema/val_loss"]) == pytest.approx(again[0]["val_loss"], rel=1e-6)


def test_validated_average_is_that_of_an_adapter(run: str, reader: Reader, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    module = module_class(_ONE)()
    module.net = peft.get_peft_model(module.net, peft.LoraConfig(target_modules=["0", "4"]))
    fitted = trainer(_ONE, tmp_path, callback(run, validate=["raw", "ema"]))

    fitted.fit(module, loader(), loader())

    found = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert found["raw/val_loss"] == found["val_loss"] != found["ema/val_loss"]
    peft.set_peft_model_state_dict(module.net, reader.load(f"{run}/ema"))
    again = trainer(_ONE, tmp_path).validate(module, loader(), verbose=False)
    assert found["ema/val_loss"] == pytest.approx(again[0]["val_loss"], rel=1e-6)


def test_step_that_the_gradient_scaler_skips_is_not_counted(run: str, reader: Reader, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fitted = trainer(_ONE, tmp_path, callback(run), plugins=[precision])

    fitted.fit(module_class(_ONE)(), loader())

    assert fitted.global_step == 2 * BATCHES
    assert 0 < (reader.run(run).step or 0) < 2 * BATCHES


def test_strategy_of_fsdp_1_is_refused_by_name(run: str) -> None:
    strategy = importlib.import_module(f"{_ONE}.strategies").FSDPStrategy()

    with pytest.raises(SettingsError, match=r"cannot be used with FSDPStrategy: .* use ModelParallelStrategy"):
        callback(run).setup(SimpleNamespace(strategy=strategy), None, "fit")


def test_averages_of_a_sharded_model_are_not_validated_in_the_training(run: str) -> None:
    strategy = importlib.import_module(f"{_ONE}.strategies").ModelParallelStrategy()

    with pytest.raises(SettingsError, match="validate= cannot be used with ModelParallelStrategy"):
        callback(run, validate="ema").setup(SimpleNamespace(strategy=strategy), None, "fit")


def test_ranks_of_model_parallel_strategy_stream_their_shards_and_resume(
    run: str, reader: Reader, tmp_path: Path
) -> None:
    for epochs in (1, 2):
        with Process(str(SUPPORT / "lightning_sharded.py"), str(tmp_path), run, str(epochs)) as ranks:
            assert ranks.wait() == 0, "\n".join(ranks.errors)

    states = [torch.load(tmp_path / f"step-{step}.pt") for step in range(1, BATCHES + 1)]
    found = reader.run(run)
    assert found.finished
    assert found.step == BATCHES  # two epochs of half the batches each
    assert next(each for each in found.averages if each.name == "ema").gap_steps == 0
    assert_close(reader.load(f"{run}/ema"), replayed([_float64(state) for state in states], _DECAY))


def test_scores_of_workers_are_logged_and_stop_the_training(run: str, reader: Reader, tmp_path: Path) -> None:
    stopping = lightning.callbacks.EarlyStopping("ema/accuracy", mode="max", patience=2)
    fitted = trainer(_ONE, tmp_path, Worker(reader, run), callback(run), stopping, max_epochs=20)

    fitted.fit(module_class(_ONE)(), loader(), loader())

    assert reader.run(run).finished
    assert fitted.current_epoch == 5  # the best score is that of the third, and two more are not better
    assert float(fitted.callback_metrics["ema/accuracy"]) == pytest.approx(0.25)
    assert float(fitted.callback_metrics["ema/step"]) == 5 * BATCHES
    assert "ema/accuracy" in fitted.logged_metrics


class Worker(lightning.Callback):  # type: ignore[name-defined]
    """Reports a score of the newest version in each epoch: the third one is the best."""

    def __init__(self, reader: Reader, run: str) -> None:
        self._reader, self._run = reader, run
        self._scores = iter([0.1, 0.2, 0.5, 0.25, 0.25])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._report(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.enable_validation:
            self._report(trainer)

    def _report(self, trainer: Any) -> None:
        ema = next(each for each in trainer.callbacks if isinstance(each, EmaCallback))
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "now.ckpt")  # publishes
        assert ema.run == self._run
        self._reader.report(f"{self._run}/ema", {"accuracy": next(self._scores)}, worker="test")


def test_scores_are_logged_at_the_end_of_an_epoch_without_a_validation(
    run: str, reader: Reader, tmp_path: Path
) -> None:
    stopping = lightning.callbacks.EarlyStopping("ema/accuracy", mode="max", patience=1)
    fitted = trainer(_ONE, tmp_path, Worker(reader, run), callback(run), stopping, max_epochs=20)

    fitted.fit(module_class(_ONE)(), loader())

    assert reader.run(run).finished
    assert fitted.current_epoch == 4
    assert float(fitted.callback_metrics["ema/accuracy"]) == pytest.approx(0.25)


def test_training_goes_on_without_the_server(run: str, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        ema = callback(
            run, endpoint=server.zmq, url=server.http, validate="ema", when_behind="skip", publish_timeout_s=2.0
        )
        checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="ema/val_loss")
        module, fitted = module_class(_ONE)(), None
        fitted = trainer(_ONE, tmp_path, ema, Killer(server), checkpoint, enable_checkpointing=True)
        fitted.fit(module, loader(), loader())

    assert fitted.global_step == 2 * BATCHES


class Killer(lightning.Callback):  # type: ignore[name-defined]
    """Kills the server after the third step."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            self._server.kill()


def test_missing_server_is_reported_before_the_training(run: str, tmp_path: Path) -> None:
    fitted = trainer(_ONE, tmp_path, callback(run, endpoint="tcp://127.0.0.1:9", connect_timeout_s=0.2))

    with pytest.raises(ConnectError):
        fitted.fit(module_class(_ONE)(), loader())

    assert fitted.global_step == 0


def test_results_of_several_dataloaders_hooks_and_metric_objects_are_logged(
    run: str, reader: Reader, tmp_path: Path
) -> None:
    module = with_metrics()
    fitted = trainer(_ONE, tmp_path, callback(run, validate="raw", module=None))

    fitted.fit(module, loader(), [loader(), loader()])

    found = {name: float(value) for name, value in fitted.callback_metrics.items()}
    own = {name for name in found if not name.startswith("raw/")}
    reported = reader.metrics(run)[-1].metrics
    assert own == {"batches", "mse/dataloader_idx_0", "mse/dataloader_idx_1", "last"}
    assert {name: found[f"raw/{name}"] for name in own} == pytest.approx({name: found[name] for name in own})
    assert reported == pytest.approx({name: found[name] for name in own})


def with_metrics() -> Any:
    class Module(module_class(_ONE)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mse = torch.nn.ModuleList(torchmetrics.MeanSquaredError() for _ in range(2))

        def on_validation_epoch_start(self) -> None:
            self.outputs: list[Tensor] = []

        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            predicted: Tensor = self.net(batch[0])
            self.mse[dataloader_idx](predicted, batch[1])
            self.log("mse", self.mse[dataloader_idx], on_step=False, on_epoch=True)
            return predicted

        def on_validation_batch_end(
            self, outputs: Tensor, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.outputs.append(outputs.mean())

        def on_validation_epoch_end(self) -> None:
            self.log_dict({"batches": float(len(self.outputs)), "last": torch.stack(self.outputs).mean()})

    return Module()


def test_averages_in_epochs_take_their_length_from_the_dataloader(run: str, reader: Reader, tmp_path: Path) -> None:
    averages = ["raw", "ema:half_life_epochs=1,name=ema"]

    trainer(_ONE, tmp_path, callback(run, decay=None, averages=averages), max_epochs=1).fit(
        module_class(_ONE)(), loader()
    )

    assert reader.version(run, "ema").half_life_steps == BATCHES


@pytest.mark.parametrize(
    ("arguments", "first"), [({"update_starting_at_step": 5}, 5), ({"update_starting_at_epoch": 1}, BATCHES)]
)
def test_average_that_begins_late_is_a_copy_until_then(
    arguments: dict[str, int], first: int, run: str, reader: Reader, tmp_path: Path
) -> None:
    steps = recorder(_ONE)

    trainer(_ONE, tmp_path, callback(run, **arguments), steps).fit(module_class(_ONE)(), loader())

    assert_close(reader.load(f"{run}/ema"), replayed(steps.states[first:], _DECAY))


def test_decay_is_that_of_one_update_of_several_steps(run: str, reader: Reader, tmp_path: Path) -> None:
    steps = recorder(_ONE)

    trainer(_ONE, tmp_path, callback(run, update_every_n_steps=4), steps).fit(module_class(_ONE)(), loader())

    assert_close(reader.load(f"{run}/ema"), replayed(steps.states[3::4], _DECAY))


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_client_attaches_to_what_fabric_sets_up(package: str, run: str, reader: Reader) -> None:
    fabric = importlib.import_module(package).Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    network, states = torch.nn.Linear(3, 1), list[dict[str, Tensor]]()
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))

    with EmaClient(run=run, averages=[f"ema:{_DECAY},name=ema"], when_behind="wait") as ema:
        ema.attach(model, optimizer)
        for inputs, targets in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
            states.append({name: value.detach().clone() for name, value in network.state_dict().items()})

    assert reader.run(run).step == BATCHES
    assert_close(reader.load(f"{run}/ema"), replayed([_float64(state) for state in states], _DECAY))


@pytest.mark.parametrize("packages", [*_PACKAGES, ", ".join(_PACKAGES)])
def test_callback_is_one_of_each_package_that_is_imported(packages: str) -> None:
    bases = " and ".join(f"issubclass(EmaCallback, {each}.Callback)" for each in packages.split(", "))
    program = f"import {packages}\nfrom trainer_client.lightning import EmaCallback\nassert {bases}"

    with Process("-c", program) as process:
        assert process.wait() == 0, "\n".join(process.errors)


def test_example_shows_that_the_average_is_validated(tmp_path: Path, server: ServerProcess, reader: Reader) -> None:
    pytest.importorskip("sklearn")
    text = _EXAMPLE.read_text()
    for shown, used in (("tcp://127.0.0.1:5555", server.zmq), ("EPOCHS = 10", "EPOCHS = 2")):
        assert text.count(shown) == 1
        text = text.replace(shown, used)
    script = tmp_path / "train_lightning.py"
    script.write_text(text)

    with Process(str(script)) as process:
        assert process.wait() == 0, "\n".join(process.errors)

    shown = ast.literal_eval(list(process.lines)[-1])
    assert shown.keys() == {"val_acc", "ema/val_acc"}
    newest = scores_of(reader.metrics("lightning-digits"))[-1]  # the best may be an earlier one after two epochs
    assert newest.metrics["lightning/val_acc"] == pytest.approx(shown["ema/val_acc"], abs=1e-4)
