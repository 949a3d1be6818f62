"""`RemoteModelEma` in place of timm's own classes: the same calls, a real server, the same weights."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_reader import Reader
from support.oracle import EPS32, largest_difference
from support.processes import ServerProcess
from support.real_timm import model_ema
from trainer_client import AverageError, ConnectError, RemoteModelEma, SettingsError

_STEPS = 210
_BOUND = _STEPS * 9 * EPS32 * 4.0  # an update rounds by at most 9 units of the last place of values up to 4
_FORM_BOUND = 2e-4  # V2's `d * e + (1 - d) * m` has float32's error in d itself, 1.2e-4 for 0.9998 (see the kernel)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server; each test has its own run."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


@pytest.fixture
def made(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes RemoteModelEmas, and closes them."""
    alive: list[RemoteModelEma] = []
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name)[:90].strip("-")

    def make(model: nn.Module, *args: Any, **given: Any) -> RemoteModelEma:
        where: dict[str, Any] = {"endpoint": server.zmq, "url": server.http, "run": name, **given}
        alive.append(RemoteModelEma(model, *args, **where))
        return alive[-1]

    yield make
    for ema in alive:
        ema.close()


class _Walk:
    """A model with batch norm, moved at random by seeded steps."""

    def __init__(self, seed: int = 5) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def step(self) -> nn.Module:
        self.model(torch.randn(16, 6))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02).clamp_(-4.0, 4.0)
        return self.model


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "given",
    [
        {"decay": 0.97},
        {"decay": 0.9998, "use_warmup": True},
        {"decay": 0.9, "use_warmup": True, "exclude_buffers": True},
        {"decay": 0.95, "update_after_step": 40},
        {"decay": 0.99, "use_warmup": True, "warmup_gamma": 5.0, "warmup_power": 0.75, "min_decay": 0.3},
    ],
    ids=["constant", "warmup", "exclude_buffers", "update_after_step", "curve"],
)
def test_average_with_step_equals_timms_model_ema_v3(made: Any, given: dict[str, Any]) -> None:
    walk = _Walk()
    ours, timms = made(walk.model, **given), model_ema().ModelEmaV3(walk.model, **given)
    for step in range(1, _STEPS + 1):
        walk.step()
        ours.update(walk.model, step=step)
        timms.update(walk.model, step=step)
        if step in (1, 2, 41, 57, _STEPS):
            assert largest_difference(_state(timms.module), _state(ours.module)) <= _BOUND, step

    assert largest_difference(_state(walk.model), _state(ours.module)) > 100 * _BOUND


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEma"])
def test_average_without_step_equals_timms_older_classes_except_integers(made: Any, version: str) -> None:
    """They truncate averaged integers, `num_batches_tracked` here; ours copies them, as V3 does."""
    walk = _Walk()
    ours, timms = made(walk.model, 0.9998), getattr(model_ema(), version)(walk.model, 0.9998)
    for _ in range(_STEPS):
        walk.step()
        ours.update(walk.model)
        timms.update(walk.model)

    theirs = _state(timms.ema if version == "ModelEma" else timms.module)
    mine = _state(ours.ema)
    tracked = "1.num_batches_tracked"
    assert mine.pop(tracked) == _STEPS
    assert theirs.pop(tracked) != _STEPS
    assert largest_difference(theirs, mine) <= _FORM_BOUND
    untrained = _state(_Walk().model)
    untrained.pop(tracked)
    assert largest_difference(untrained, mine) > 10 * _FORM_BOUND


@pytest.mark.parametrize("with_step", [True, False])
def test_set_weights_count_from_the_next_update(made: Any, with_step: bool) -> None:
    walk, other = _Walk(), _Walk(6)
    ours, timms = (
        made(walk.model, 0.9, use_warmup=with_step),
        model_ema().ModelEmaV3(walk.model, 0.9, use_warmup=with_step),
    )
    for step in range(1, 31):
        walk.step()
        for average in (ours, timms):
            average.update(walk.model, step if with_step else None)
        if step in (10, 11, 20):
            ours.set(other.model)
            timms.set(other.model)
            assert largest_difference(_state(other.model), _state(ours.module)) == 0, "seen at once, without the server"
            other.step()
        assert step % 10 not in (0, 1) or largest_difference(_state(timms.module), _state(ours.module)) <= _BOUND

    assert largest_difference(_state(timms.module), _state(ours.module)) <= _BOUND


def test_module_is_fetched_on_access_and_cached_until_the_next_update(made: Any, server: ServerProcess) -> None:
    walk = _Walk()
    ours = made(walk.model, 0.5)
    assert largest_difference(_state(walk.model), _state(ours.module)) == 0, "before any update: the weights as given"
    ours.update(walk.step(), step=1)
    ours.update(walk.step(), step=2)
    seen = _state(ours.module)
    with Reader(server.http) as reader:
        assert [version.step for version in reader.versions(ours.run, ours.average)] == [2]
        assert largest_difference(_state(ours.module), seen) == 0
        assert len(reader.versions(ours.run, ours.average)) == 1, "looking again asks for nothing"
    held = ours.module
    ours.update(walk.step(), step=3)
    assert ours.module is held, "the same module, for code that compiled or wrapped it"
    assert largest_difference(_state(held), seen) > 0
    assert not any(module.training for module in held.modules())
    assert not any(parameter.requires_grad for parameter in held.parameters())
    question = torch.randn(4, 6)
    assert torch.equal(ours(question), held(question))


def test_last_average_is_readable_after_finish(made: Any) -> None:
    walk = _Walk()
    ours, timms = made(walk.model, 0.9), model_ema().ModelEmaV3(walk.model, 0.9)
    for step in (1, 2, 3):
        walk.step()
        ours.update(walk.model, step=step)
        timms.update(walk.model, step=step)
    assert ours.finish()

    assert largest_difference(_state(timms.module), _state(ours.module)) <= _BOUND


def test_average_with_a_too_long_default_name_can_be_named(made: Any) -> None:
    walk, curve = _Walk(), {"warmup_gamma": 1.2345678901234567, "warmup_power": 0.1234567890123456, "min_decay": 1 / 3}
    with pytest.raises(SettingsError, match="give it one with name="):
        made(walk.model, 0.9998765432101, use_warmup=True, **curve, exclude_buffers=True)
    ours = made(walk.model, 0.9998765432101, use_warmup=True, **curve, exclude_buffers=True, name="slow")
    ours.update(walk.model, step=1)

    assert ours.average == "slow"
    assert largest_difference(_state(walk.model), _state(ours.module)) == 0


def test_wrappers_are_removed_from_the_module(made: Any) -> None:
    walk = _Walk()
    ours = made(nn.DataParallel(walk.model), 0.9)
    ours.set(nn.DataParallel(walk.step()))
    ours.update(nn.DataParallel(walk.model), step=1)

    assert largest_difference(_state(walk.model), _state(ours.module)) == 0


def test_compiled_module_uses_each_new_average(made: Any) -> None:
    """As timm's script does: compiled once, `eval()` before each validation."""
    walk, question = _Walk(), torch.randn(4, 6)
    ours = made(walk.model, 0.5)
    compiled: Any = torch.compile(ours, backend="eager")
    for step in (1, 2, 3):
        ours.update(walk.step(), step=step)
        compiled.eval()
        torch.testing.assert_close(compiled(question), ours.module(question))
        assert largest_difference(_state(walk.model), _state(ours.module)) > 0 or step == 1


def test_state_dicts_use_timms_names_in_both_directions(made: Any) -> None:
    walk, other = _Walk(), _Walk(6)
    ours, timms = made(walk.model, 0.9), model_ema().ModelEmaV3(walk.model, 0.9)
    ours.update(walk.step(), step=1)
    assert list(ours.state_dict()) == list(timms.state_dict())

    timms.set(other.model)
    ours.load_state_dict(timms.state_dict())
    assert largest_difference(_state(other.model), _state(ours.module)) == 0
    ours.load_state_dict(_Walk(7).model.state_dict())
    assert largest_difference(_state(_Walk(7).model), _state(ours.module)) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"module.0.weight": torch.zeros(8, 6)})


@pytest.mark.parametrize("same_run", [True, False])
def test_resumed_training_continues_like_timms(made: Any, same_run: bool) -> None:
    """As in timm's script, which loads the checkpoint's average into `.module` and continues with the next step."""
    walk = _Walk()
    given = {"decay": 0.995, "use_warmup": True}
    first, timms = made(walk.model, **given), model_ema().ModelEmaV3(walk.model, **given)
    for step in range(1, 61):
        walk.step()
        first.update(walk.model, step=step)
        timms.update(walk.model, step=step)
        if step == 50:
            saved, weights = _state(first.module), copy.deepcopy(walk.model)
            at_50 = copy.deepcopy(timms.module.state_dict())
    first.close()

    walk.model = weights
    timms.module.load_state_dict(at_50)
    second = made(walk.model, **given, **({} if same_run else {"run": f"{first.run}-new"}))
    second.module.load_state_dict(saved)
    for step in range(51, 111):
        walk.step()
        second.update(walk.model, step=step)
        timms.update(walk.model, step=step)
    assert largest_difference(_state(timms.module), _state(second.module)) <= _BOUND


def test_new_run_that_begins_late_continues_from_the_set_weights(made: Any) -> None:
    """As in a script that resumes from its own checkpoint while the server has lost the run."""
    walk, average = _Walk(), _Walk(6)
    ours, timms = made(walk.model, 0.9), model_ema().ModelEmaV3(walk.model, 0.9)
    for ema in (ours, timms):
        ema.set(average.model)
    for step in (51, 52):
        walk.step()
        ours.update(walk.model, step=step)
        timms.update(walk.model, step=step)

    assert largest_difference(_state(timms.module), _state(ours.module)) <= _BOUND
    assert largest_difference(_state(walk.model), _state(ours.module)) > 100 * _BOUND


def test_other_ranks_send_nothing_and_wait_for_the_version_of_rank_0(made: Any, server: ServerProcess) -> None:
    walk = _Walk()
    zero, one = made(walk.model, 0.9), made(walk.model, 0.9, rank=1, endpoint="tcp://127.0.0.1:9")
    for step in (1, 2, 3):
        walk.step()
        zero.update(walk.model, step=step)
        one.update(walk.model, step=step)
    expected = _state(zero.module)

    assert largest_difference(expected, _state(one.module)) == 0
    assert server.get(f"/v1/runs/{zero.run}")["applied"] == 3
    late = made(walk.model, 0.9, rank=2, module_timeout_s=0.5)
    late.update(walk.model, step=4)
    with pytest.raises(AverageError, match=r"ema-0\.9 at step 4"):
        _ = late.module


def test_other_ranks_must_know_the_run(monkeypatch: pytest.MonkeyPatch, server: ServerProcess) -> None:
    monkeypatch.delenv("EMA_RUN", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match="EMA_RUN"):
        RemoteModelEma(_Walk().model)


def test_addresses_and_the_run_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, server: ServerProcess
) -> None:
    monkeypatch.setenv("EMA_ENDPOINT", server.zmq)
    monkeypatch.setenv("EMA_URL", server.http)
    monkeypatch.setenv("EMA_RUN", "from-the-environment")
    ours = RemoteModelEma(_Walk().model, 0.9)
    ours.update(_Walk().model, step=1)

    assert largest_difference(_state(_Walk().model), _state(ours.module)) == 0
    assert ours.finish()
    assert server.get("/v1/runs/from-the-environment")["state"] == "finished"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"dtype": torch.float32}, r"dtype=torch.float32 cannot be honoured"),
        ({"use_muon": True}, "use_muon=True cannot be honoured"),
        ({"resume": "checkpoint.pth"}, "resume='checkpoint.pth'"),
        ({"decay": 1.5}, "decay 1.5"),
        ({"use_warmup": True, "warmup_gamma": -1.0}, "gamma -1.0"),
        ({"update_after_step": -1}, "update_after -1"),
        ({"rank": -1}, "rank=-1"),
    ],
    ids=str,
)
def test_unsupported_arguments_are_refused_by_name(made: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        made(_Walk().model, **given)


def test_step_is_given_always_or_never(made: Any) -> None:
    walk = _Walk()
    ours = made(walk.model, 0.9)
    ours.update(walk.model, step=1)
    with pytest.raises(SettingsError, match="always or never"):
        ours.update(walk.model)


def test_missing_server_fails_at_once_and_a_lost_one_affects_only_reads(
    made: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConnectError, match="nothing listens"):
        made(_Walk().model, endpoint="tcp://127.0.0.1:9", connect_timeout_s=0.5)
    walk = _Walk()
    with ServerProcess(tmp_path_factory.mktemp("gone") / "data") as server:
        ours = made(walk.model, 0.9, endpoint=server.zmq, url=server.http, wait_timeout_s=0.2, module_timeout_s=0.5)
        ours.update(walk.step(), step=1)
        drawn = random.getstate()
        server.kill()
    for step in range(2, 6):
        ours.update(walk.step(), step=step)
    with pytest.raises(AverageError, match="at step 5 was not published"):
        _ = ours.module
    assert random.getstate() == drawn, "reconnecting draws nothing from the generator that a seeded training uses"
