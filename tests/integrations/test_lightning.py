"""`EmaCallback` in trainings with the real Lightning, of both of its packages."""

from __future__ import annotations

import importlib
import json
import math
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.lightning_training import BATCHES, loader, module_class, recorder, replayed, trainer
from support.processes import SUPPORT, Process, ServerProcess

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")

from ema_reader import Reader  # noqa: E402
from trainer_client import SettingsError  # noqa: E402
from trainer_client.lightning import EmaCallback  # noqa: E402

_ONE = "lightning.pytorch"
_PACKAGES = (_ONE, "pytorch_lightning")
_DECAY = 0.8
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
        ({"update_starting_at_step": 3}, "update_starting_at_step goes with decay="),
        ({"use_buffers": False}, "use_buffers goes with decay="),
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
    assert all("ema/val_loss" in each for each in metrics)


def _float64(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items()}
