"""`RemoteEMAModel` in place of diffusers' `EMAModel`: the same calls, a real server, the same weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_reader import Reader
from support.oracle import EPS32
from support.processes import Process, ServerProcess
from support.small_unet import small_unet
from trainer_client import AverageError, PlanError, SettingsError
from trainer_client.diffusers import RemoteEMAModel

_STEPS = 60
_BOUND = _STEPS * 9 * EPS32 * 4.0  # an update rounds by at most 9 units of the last place of values up to 4
_ROOT = Path(__file__).parents[2]
_SCRIPT = str(Path(__file__).with_name("stand_in_diffusers.py"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server; each test has its own run."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """The test's own run."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name)[-60:].strip("-")


@pytest.fixture
def made(server: ServerProcess, run: str) -> Iterator[Any]:
    """Makes RemoteEMAModels, and closes them."""
    alive: list[RemoteEMAModel] = []

    def make(parameters: Any, make: Any = RemoteEMAModel, **given: Any) -> RemoteEMAModel:
        alive.append(make(parameters, **{"endpoint": server.zmq, "url": server.http, "run": run, **given}))
        return alive[-1]

    yield make
    for ema in alive:
        ema.close()


def _walk(model: nn.Module, step: int) -> None:
    """Move the trained parameters as an optimizer would, by an amount that depends on the step."""
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter.dtype), alpha=0.02).clamp_(
                    -4.0, 4.0
                )


def _difference(one: Any, other: Any) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def _clones(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "update_after_step": {"decay": 0.7, "update_after_step": 7},
    "constant": {"decay": 0.9, "min_decay": 0.9},
    "constant with warm-up": {"decay": 0.9, "min_decay": 0.9, "use_ema_warmup": True},
    "warm-up": {"use_ema_warmup": True, "power": 0.75},
    "curve": {
        "decay": 0.9,
        "min_decay": 0.3,
        "use_ema_warmup": True,
        "inv_gamma": 3.0,
        "power": 0.8,
        "update_after_step": 5,
        "foreach": True,
    },
}


@pytest.mark.parametrize("given", _VARIANTS.values(), ids=list(_VARIANTS))
def test_average_and_decay_equal_those_of_emamodel(made: Any, given: dict[str, Any]) -> None:
    model = small_unet()
    model.conv_in.requires_grad_(False)
    ours, theirs = made(model.parameters(), **given), EMAModel(model.parameters(), **given)
    for step in range(1, _STEPS + 1):
        _walk(model, step)
        live = _clones(model.parameters())
        for ema in (ours, theirs):
            ema.step(model.parameters())
        assert _difference(live, model.parameters()) == 0.0
        assert ours.cur_decay_value == theirs.cur_decay_value
        assert ours.get_decay(step * 997) == theirs.get_decay(step * 997)
        if step in (1, 2, 30):
            assert _difference(theirs.shadow_params, ours.shadow_params) <= _BOUND, step

    assert ours.optimization_step == theirs.optimization_step == _STEPS
    assert _difference(theirs.shadow_params, ours.shadow_params) <= _BOUND
    assert _difference(model.parameters(), ours.shadow_params) > 100 * _BOUND


def test_validation_sees_the_average_and_training_goes_on_with_the_live_weights(made: Any) -> None:
    model = small_unet()
    ours, theirs = made(model.parameters(), decay=0.9), EMAModel(model.parameters(), decay=0.9)
    for step in range(1, 6):
        _walk(model, step)
        ours.step(model.parameters())
        theirs.step(model.parameters())
    live, places = _clones(model.parameters()), [parameter.data_ptr() for parameter in model.parameters()]

    ours.store(model.parameters())
    ours.copy_to(model.parameters())
    assert _difference(theirs.shadow_params, model.parameters()) <= _BOUND
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    ours.restore(model.parameters())
    assert _difference(live, model.parameters()) == 0.0
    with pytest.raises(RuntimeError, match="nothing is stored"):
        ours.restore(model.parameters())


def test_before_the_first_step_the_average_is_the_parameters_of_the_constructor(made: Any) -> None:
    model, other = small_unet(0), small_unet(1)
    ours = made(model.parameters())
    ours.copy_to(other.parameters())

    assert _difference(model.parameters(), other.parameters()) == 0.0


def test_saved_average_is_the_one_that_emamodel_saves_and_continues_in_a_new_run(
    made: Any, tmp_path: Path, run: str
) -> None:
    model = small_unet()
    given: dict[str, Any] = {"decay": 0.9, "use_ema_warmup": True, "model_cls": UNet2DModel}
    ours = made(model.parameters(), **given, model_config=model.config)
    theirs = EMAModel(model.parameters(), **given, model_config=model.config)
    for step in range(1, 11):
        _walk(model, step)
        ours.step(model.parameters())
        theirs.step(model.parameters())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    assert _difference(UNet2DModel.from_pretrained(tmp_path / "ours").parameters(), theirs.shadow_params) <= _BOUND

    resumed = made(tmp_path / "theirs", RemoteEMAModel.from_pretrained, model_cls=UNet2DModel, run=f"{run}-2")
    restarted = made(model.parameters(), run=f"{run}-3")
    restarted.load_state_dict(torch.load(_saved(theirs, tmp_path), weights_only=True))
    assert resumed.run is None, "it has connected"
    for step in range(11, 21):
        _walk(model, step)
        for ema in (theirs, resumed, restarted):
            ema.step(model.parameters())
    for ema in (resumed, restarted):
        assert (ema.optimization_step, ema.cur_decay_value) == (20, theirs.cur_decay_value)
        assert _difference(theirs.shadow_params, ema.shadow_params) <= _BOUND


def _saved(ema: Any, folder: Path) -> Path:
    torch.save(ema.state_dict(), folder / "ema_state.pt")
    return folder / "ema_state.pt"


@pytest.mark.parametrize("same_run", [True, False])
def test_run_that_continues_keeps_digits_that_the_weights_do_not_have(
    made: Any, tmp_path: Path, run: str, same_run: bool
) -> None:
    """A replacement of the average goes out in the dtype of the weights, bfloat16 here."""
    model = small_unet().to(torch.bfloat16)
    whole = made(model.parameters(), run=f"{run}-whole", decay=0.8)
    part = made(model.parameters(), decay=0.8, model_cls=UNet2DModel, model_config=model.config)
    for step in range(1, 11):
        if step == 6:
            part.save_pretrained(tmp_path)
            part.close()
            there = run if same_run else f"{run}-other"
            part = made(tmp_path, RemoteEMAModel.from_pretrained, model_cls=UNet2DModel, run=there)
        _walk(model, step)
        whole.step(model.parameters())
        part.step(model.parameters())

    difference = _difference(whole.shadow_params, part.shadow_params)
    assert difference == 0.0 if same_run else 0.0 < difference < 0.01


def test_state_that_is_loaded_in_mid_run_takes_the_run_back(made: Any) -> None:
    model = small_unet()
    ours, theirs = made(model.parameters(), decay=0.8), EMAModel(model.parameters(), decay=0.8)
    for step in range(1, 6):
        _walk(model, step)
        ours.step(model.parameters())
        theirs.step(model.parameters())
    state, weights = ours.state_dict(), _clones(model.parameters())
    for step in range(6, 9):
        _walk(model, step)
        ours.step(model.parameters())
    ours.load_state_dict(state)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    _walk(model, 100)
    ours.step(model.parameters())
    theirs.step(model.parameters())

    assert _difference(theirs.shadow_params, ours.shadow_params) <= _BOUND
    with pytest.raises(SettingsError, match=r"decay=0.5.*joined with .*decay=0.8"):
        ours.load_state_dict({**state, "decay": 0.5})


@pytest.mark.parametrize("known_by", ["generator", "model", "model_cls", "first generator", "other model"])
def test_average_has_the_names_of_the_model(made: Any, server: ServerProcess, run: str, known_by: str) -> None:
    model = small_unet()
    listed = list(model.parameters())
    config = {"model_cls": UNet2DModel, "model_config": model.config}
    given: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "generator": (listed, model.parameters(), {}),
        "model": (listed, listed, {"model": model}),
        "model_cls": (listed, listed, config),
        "first generator": (model.parameters(), listed, {}),
        "other model": (listed, listed, {"model": small_unet(1)}),
    }
    first, then, more = given[known_by]
    ema = made(first, **more)
    ema.step(then)
    assert ema.finish()

    with Reader(server.http) as reader:
        loaded = reader.load(reader.version(run, "ema"))
    assert list(loaded) == list(model.state_dict())
    assert _difference(loaded.values(), model.state_dict().values()) == 0.0


def test_downloaded_average_is_a_model_of_diffusers(made: Any, server: ServerProcess, run: str, tmp_path: Path) -> None:
    model = small_unet()
    ema = made(list(model.parameters()), model_cls=UNet2DModel, model_config=model.config)
    ema.step(model.parameters())
    assert ema.finish()

    with Reader(server.http) as reader:
        folder = reader.download(reader.version(run, "ema"), tmp_path / "average")
    loaded = UNet2DModel.from_pretrained(folder)
    assert list(loaded.config.block_out_channels) == [8, 16]
    assert _difference(loaded.parameters(), model.parameters()) == 0.0


def test_parameters_without_names_get_numbers_and_a_warning(
    made: Any, server: ServerProcess, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))]
    ema = made(tensors)
    ema.step(tensors)
    assert ema.finish()

    assert "numbers as names" in caplog.text
    with Reader(server.http) as reader:
        assert list(reader.load(reader.version(run, "ema"))) == ["parameter.0", "parameter.1"]


def test_other_parameters_are_refused_before_anything_is_sent_or_written(made: Any, server: ServerProcess) -> None:
    model = small_unet()
    ema = made(model.parameters())
    with pytest.raises(PlanError, match="143 parameters were given, and the average has 144"):
        ema.step(list(model.parameters())[1:])
    ema.step(model.parameters())
    before = _clones(model.parameters())
    with pytest.raises(PlanError, match=r"number 0.*shape"):
        ema.copy_to([*reversed(list(model.parameters()))])

    assert _difference(before, model.parameters()) == 0.0
    assert ema.optimization_step == 1


def test_buffers_and_tied_weights_are_in_the_average(made: Any, server: ServerProcess, run: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    ema = made(model.parameters(), use_ema_warmup=True)
    state = None
    for step in (1, 2, 3):
        model(torch.randn(8, 4))
        _walk(model, step)
        ema.step(model.parameters())
        if step == 2:
            state = ema.state_dict()
            ema.load_state_dict(state)
    assert ema.finish()

    with Reader(server.http) as reader:
        loaded = reader.load(reader.version(run, "ema"))
    assert sorted(loaded) == sorted(model.state_dict())
    assert torch.equal(loaded["1.running_mean"], model.state_dict()["1.running_mean"])


def test_copy_without_a_server_raises_and_writes_nothing(tmp_path: Path) -> None:
    model = small_unet()
    with ServerProcess(tmp_path / "data") as own:
        ema = RemoteEMAModel(model.parameters(), endpoint=own.zmq, url=own.http, run="r", copy_timeout_s=1.0)
        _walk(model, 1)
        ema.step(model.parameters())
        own.kill()
        _walk(model, 2)
        ema.step(model.parameters())
        before = _clones(model.parameters())
        with pytest.raises(AverageError, match="not published within 1 s"):
            ema.copy_to(model.parameters())
        ema.close()

    assert _difference(before, model.parameters()) == 0.0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"decay": 1.0}, "decay"),
        ({"min_decay": 0.5}, "use_ema_warmup=True"),
        ({"update_after_step": -1}, "update_after_step=-1"),
        ({"sharded": True}, "sharded=True cannot be honoured"),
        ({"copy_timeout_s": -1}, "copy_timeout_s"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RemoteEMAModel([], **given, connect=False)


def test_deprecated_arguments_mean_what_they_mean_in_emamodel() -> None:
    with pytest.warns(FutureWarning, match="max_value"):
        ours = RemoteEMAModel([], max_value=0.5, min_value=0.25, device="cpu", use_ema_warmup=True, connect=False)
    with pytest.warns(FutureWarning, match="a module instead of its parameters"):
        module = RemoteEMAModel(nn.Linear(2, 2), connect=False)

    assert (ours.state_dict()["decay"], ours.state_dict()["min_decay"]) == (0.5, 0.25)
    assert module.state_dict()["use_ema_warmup"] is True


def test_ranks_other_than_zero_count_and_send_nothing(made: Any, server: ServerProcess, run: str) -> None:
    model = small_unet()
    zero, one = made(model.parameters(), rank=0), made(model.parameters(), rank=1, endpoint=None)
    for step in (1, 2):
        _walk(model, step)
        for ema in (zero, one):
            ema.step(model.parameters())

    assert _difference(zero.shadow_params, one.shadow_params) == 0.0
    assert one.finish() is False
    assert server.get(f"/v1/runs/{run}")["state"] == "active"


def _environment(server: ServerProcess, run: str) -> dict[str, str]:
    return {"EMA_ENDPOINT": server.zmq, "EMA_URL": server.http, "EMA_RUN": run}


def _run(*command: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    with Process(*command, env=env) as process:
        code = process.wait(120.0)
        return code, "\n".join(process.errors)


def _files_differ(one: Path, other: Path) -> float:
    name = "diffusion_pytorch_model.safetensors"
    mine, theirs = load_file(one / name), load_file(other / name)
    assert sorted(mine) == sorted(theirs)
    return _difference(mine.values(), (theirs[key] for key in mine))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_unmodified_script_killed_and_resumed_saves_the_average_of_one_that_ran_through(
    tmp_path: Path, server: ServerProcess, run: str
) -> None:
    plain, remote = (str(tmp_path / name) for name in ("plain", "remote"))
    env = _environment(server, run)
    assert _run(_SCRIPT, "--use_ema", "--output_dir", plain)[0] == 0
    command = ("-m", "trainer_client.diffusers", _SCRIPT, "--use_ema", "--output_dir", remote)
    code, _ = _run(*command, "--kill_after", "10", env=env)
    assert code == -9
    code, said = _run(*command, "--resume_from_checkpoint", "checkpoint-8", env=env)
    assert code == 0, said

    assert f"the average is kept by the server: {run}/ema" in said
    for folder in ("live", "ema", "restored", "checkpoint-8/unet_ema", "checkpoint-12/unet_ema"):
        assert _files_differ(tmp_path / "plain" / folder, tmp_path / "remote" / folder) <= _BOUND, folder
    assert _files_differ(tmp_path / "remote" / "live", tmp_path / "remote" / "ema") > 100 * _BOUND
    assert server.get(f"/v1/runs/{run}")["state"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_script_on_two_ranks_saves_the_same_average(tmp_path: Path, server: ServerProcess, run: str) -> None:
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    plain, remote = (str(tmp_path / name) for name in ("plain", "remote"))
    code, said = _run(*launch, _SCRIPT, "--use_ema", "--steps=4", "--output_dir", plain)
    assert code == 0, said
    command = ("-m", "trainer_client.diffusers", _SCRIPT, "--use_ema", "--steps=4", "--output_dir", remote)
    code, said = _run(*launch, *command, env=_environment(server, run))
    assert code == 0, said

    assert _files_differ(tmp_path / "plain" / "ema", tmp_path / "remote" / "ema") <= _BOUND
    assert server.get(f"/v1/runs/{run}")["state"] == "finished"


def test_calls_of_lerobot_evaluate_save_and_resume_the_average(
    made: Any, server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """As in lerobot_train.py: no class of a model, buffers, a constant decay, `ema_state.pt`."""
    policy = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    given: dict[str, Any] = {"decay": 0.9, "min_decay": 0.9, "update_after_step": 0, "use_ema_warmup": True}
    more = {"inv_gamma": 1.0, "power": 0.75}
    ours, theirs = made(policy.parameters(), **given, **more), EMAModel(policy.parameters(), **given, **more)
    for step in range(1, 9):
        if step == 5:
            torch.save(ours.state_dict(), tmp_path / "ema_state.pt")
            live = _clones(policy.parameters())
            ours.store(list(policy.parameters()))
            ours.copy_to(list(policy.parameters()))
            assert _difference(theirs.shadow_params, policy.parameters()) <= _BOUND
            ours.restore(list(policy.parameters()))
            assert _difference(live, policy.parameters()) == 0.0
            ours.close()
            ours = made(policy.parameters(), **given, **more)
            ours.load_state_dict(torch.load(tmp_path / "ema_state.pt", map_location="cpu", weights_only=True))
        policy(torch.randn(8, 4))
        _walk(policy, step)
        ours.step(policy.parameters())
        theirs.step(policy.parameters())
    assert ours.finish()

    assert _difference(theirs.shadow_params, ours.shadow_params) <= _BOUND
    with Reader(server.http) as reader:
        policy.load_state_dict(reader.load(reader.version(run, "ema")))
    assert _difference(theirs.shadow_params, policy.parameters()) <= _BOUND


def test_class_of_the_guide_has_the_calls_of_simpletuner(server: ServerProcess, run: str, tmp_path: Path) -> None:
    """As in simpletuner's trainer.py, validation.py and save_hooks.py, in full training without sharding."""
    guide = (_ROOT / "docs" / "guides" / "diffusers.md").read_text()
    code = guide[guide.index("## SimpleTuner") :].split("```")[1].removeprefix("python")
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(code, "docs/guides/diffusers.md", "exec"), scope)  # noqa: S102
    model = small_unet()
    listed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = scope["EMAModel"](
        object(),
        object(),
        parameters=listed,
        model_cls=UNet2DModel,
        model_config=model.config,
        decay=0.9,
        warmup_steps=0,
        foreach=True,
        endpoint=server.zmq,
        url=server.http,
        run=run,
    )
    theirs = EMAModel(listed, decay=0.9)
    ema.to("cpu", dtype=torch.bfloat16)
    ema.pin_memory()
    assert ema.parameter_count() == sum(parameter.numel() for parameter in listed)
    for step in range(1, 6):
        _walk(model, step)
        ema.step(parameters=listed, global_step=step)
        theirs.step(listed)
        assert ema.get_decay() == theirs.cur_decay_value
    ema.save_state_dict(tmp_path / "ema_model.pt")
    ema.load_state_dict(tmp_path / "ema_model.pt")
    ema.save_pretrained(tmp_path / "ema")
    ema.close()

    assert _difference(UNet2DModel.from_pretrained(tmp_path / "ema").parameters(), theirs.shadow_params) <= _BOUND


def test_example_validates_and_saves_the_average(
    server: ServerProcess, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    source = (_ROOT / "examples" / "train_diffusers.py").read_text()
    for printed, here in (("STEPS = 300", "STEPS = 6"), ("VALIDATE_STEPS = 100", "VALIDATE_STEPS = 3")):
        assert source.count(printed) == 1
        source = source.replace(printed, here)
    for name, value in _environment(server, run).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "train_diffusers.py", "exec"), {"__name__": "__main__"})  # noqa: S102

    assert re.findall(r"step (\d): validation loss \d\.\d+, of the average \d", capsys.readouterr().out) == ["3", "6"]
    assert (tmp_path / "digits-unet-ema" / "diffusion_pytorch_model.safetensors").exists()
    assert server.get(f"/v1/runs/{run}")["state"] == "finished"


_FAKE = """
class EMAModel:
    def __init__(self, parameters, decay=0.9999{more}):
        pass

    def step(self, parameters):
        pass
"""


def _fake_diffusers(folder: Path, more: str = "") -> dict[str, str]:
    """A package that takes the place of diffusers; it is imported faster."""
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "__init__.py").write_text("__version__ = '99'\n")
    (folder / "diffusers" / "training_utils.py").write_text(_FAKE.format(more=more))
    return {"PYTHONPATH": str(folder)}


def test_script_without_an_average_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("print('I ran')\n")
    code, said = _run("-m", "trainer_client.diffusers", str(script), env=_fake_diffusers(tmp_path))

    assert code == 2
    assert "nothing was averaged. Is --use_ema among its arguments?" in said
    assert "Traceback" not in said


def test_unknown_emamodel_is_refused_before_the_script_runs(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("raise RuntimeError('it ran')\n")
    code, said = _run("-m", "trainer_client.diffusers", str(script), env=_fake_diffusers(tmp_path, ", sharded=False"))

    assert code == 2
    assert "EMAModel of diffusers 99 is not the one that we know: sharded differ" in said
    assert "it ran" not in said


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["no/such.py"], 2)], ids=str)
def test_wrong_arguments_are_one_line(arguments: list[str], code: int) -> None:
    with Process("-m", "trainer_client.diffusers", *arguments) as process:
        assert process.wait() == code
        assert "usage:" in "".join((*process.lines, *process.errors)) or "no/such.py is no file" in process.errors[0]
