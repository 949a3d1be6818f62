"""Whose steps are seen: optimizers inside wrappers, around others, replaced, or not given to `attach` at all."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from support.fake_worker import OfflineClient
from trainer_client import SettingsError
from trainer_client.steps.hooks import Attachment
from trainer_client.steps.optimizers import _INNER


class Forwarding(Optimizer):
    """As AcceleratedOptimizer: an Optimizer that does not call `Optimizer.__init__`, and steps only now and then."""

    def __init__(self, optimizer: Optimizer, accumulate: int = 1) -> None:
        self.optimizer = optimizer
        self.calls = 0
        self.accumulate = accumulate

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % self.accumulate == 0:
            self.optimizer.step(closure)


class Facade:
    """As LightningOptimizer: no Optimizer at all, with one inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> None:
        self._optimizer.step(closure)


class Sharpness(Optimizer):
    """As SAM: perturbs the weights in `first_step`, and takes them back and steps the inner one in `second_step`."""

    def __init__(self, parameters: Any, base: type[Optimizer], **given: Any) -> None:
        super().__init__(parameters, given)
        self.base_optimizer = base(self.param_groups, **given)

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(100.0)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        self.second_step()


class Bare(Optimizer):
    """Does not call `Optimizer.__init__`; with or without the tables of hooks that other code expects."""

    def __init__(self, parameters: Any, *, tables: bool) -> None:
        self.param_groups = [{"params": list(parameters)}]
        self.state, self.defaults = defaultdict(dict), {}
        if tables:
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(1.0)


class ScheduleFree(Optimizer):
    """As schedulefree's wrapper: steps the optimizer in `base`, and writes the weights after that."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)


class Chained(Optimizer):
    """Hooked by torch; steps one optimizer for each parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.parts = [SGD([parameter], lr=0.1) for parameter in self.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _lookahead(base: Optimizer, k: int) -> Any:
    """timm's, from its file: its package wants torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    path = Path(spec.origin).parent / "optim" / "lookahead.py"
    file = importlib.util.spec_from_file_location("timm_lookahead", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module.Lookahead(base, k=k)


def _model() -> nn.Linear:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def _client(**given: Any) -> OfflineClient:
    return OfflineClient("tcp://127.0.0.1:5555", run="r", **given)


def _attachment_of(client: OfflineClient) -> Attachment:
    assert client._session is not None
    return client._session.attachment


def _is_last(client: OfflineClient, model: nn.Module) -> bool:
    sent = client.worker.sent(-1)
    return all(torch.equal(sent[name], tensor) for name, tensor in model.state_dict().items())


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class Slotted:
    """Refuses attributes of ours."""

    __slots__ = ("__weakref__", "optimizer")

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


class OptimizerInBackwardWrapper:
    """As torchtune's: keeps an optimizer for each parameter, and has no step."""

    def __init__(self, optim_map: dict[str, Optimizer]) -> None:
        self.optim_map = optim_map


_SHAPES: dict[str, Callable[[nn.Module], Any]] = {
    "accelerate": lambda model: Forwarding(SGD(model.parameters(), lr=0.1)),
    "accelerate twice": lambda model: Forwarding(Forwarding(SGD(model.parameters(), lr=0.1))),
    "lightning": lambda model: Facade(SGD(model.parameters(), lr=0.1)),
    "sam": lambda model: Sharpness(model.parameters(), SGD, lr=0.1),
    "lookahead": lambda model: _lookahead(SGD(model.parameters(), lr=0.1), k=2),
    "lookahead in accelerate": lambda model: Forwarding(_lookahead(SGD(model.parameters(), lr=0.1), k=2)),
    "schedule free": lambda model: ScheduleFree(SGD(model.parameters(), lr=0.1)),
    "chained": lambda model: Chained(model.parameters()),
    "bare": lambda model: Bare(model.parameters(), tables=False),
    "bare with tables": lambda model: Bare(model.parameters(), tables=True),
}


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("scheduled", ["", "before", "after"])
def test_each_real_step_is_sent_with_its_final_weights(
    shape: str, scheduled: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model()
    optimizer = _SHAPES[shape](model)
    inner = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
    inner = inner if hasattr(inner, "defaults") else getattr(inner, "optimizer", inner)
    client = _client()
    schedulers = []
    if scheduled == "before" and hasattr(inner, "defaults"):
        schedulers.append(_scheduler(inner))
    handle = client.attach(model, optimizer)
    if scheduled == "after" and hasattr(inner, "defaults"):
        schedulers.append(_scheduler(inner))

    for step in range(1, 5):
        optimizer.step()
        assert client.worker.steps == list(range(1, step + 1))
        assert _is_last(client, model)
        for scheduler in schedulers:
            scheduler.step()
    handle.remove()
    optimizer.step()

    assert client.worker.steps == [1, 2, 3, 4]
    assert _errors(caplog) == []


def _scheduler(optimizer: Optimizer) -> StepLR:
    optimizer.param_groups[0].setdefault("lr", 0.1)
    return StepLR(optimizer, 1)


@pytest.mark.parametrize("attribute", _INNER)
def test_snapshot_is_of_what_a_wrapper_leaves_wherever_it_keeps_the_optimizer(attribute: str) -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            setattr(self, attribute, optimizer)

        @torch.no_grad()
        def step(self) -> None:
            getattr(self, attribute).step()
            model.weight.mul_(0.5)

    model, client = _model(), _client()
    wrapper: Any = Wrapper(SGD(model.parameters(), lr=0.1))
    client.attach(model, wrapper)
    for _ in range(2):
        wrapper.step()
        assert _is_last(client, model)

    assert client.worker.steps == [1, 2]


@pytest.mark.parametrize("layers", [1, 100], ids=["2 parameters", "200 parameters"])
def test_optimizers_kept_for_each_parameter_are_followed_together(
    layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, client = nn.Sequential(*(_model() for _ in range(layers))), _client()
    kept: Any = OptimizerInBackwardWrapper({name: SGD([each], lr=0.1) for name, each in model.named_parameters()})
    client.attach(model, kept)
    for _ in range(3):
        for optimizer in reversed(kept.optim_map.values()):
            optimizer.step()

    assert client.finish()
    assert client.worker.steps == [1, 2, 3]
    assert _is_last(client, model)
    assert _errors(caplog) == []


def test_wrapper_whose_properties_fail_is_followed_by_those_that_work() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.base = optimizer

        @property
        def optimizer(self) -> Optimizer:
            raise RuntimeError("not yet")

        param_groups = train_mode = eval = optimizer

        def step(self) -> None:
            self.base.step()

    model, client = _model(), _client()
    wrapper: Any = Wrapper(SGD(model.parameters(), lr=0.1))
    client.attach(model, wrapper)
    wrapper.step()

    assert client.worker.steps == [1]


def test_weights_swapped_for_an_evaluation_are_no_step() -> None:
    class Swapping(SGD):
        train_mode = True

        @torch.no_grad()
        def eval(self) -> None:
            model.weight.mul_(0.5)

        @torch.no_grad()
        def train(self) -> None:
            model.weight.mul_(2.0)

    model, client = _model(), _client()
    optimizer = Swapping(model.parameters(), lr=0.1)
    client.attach(model, optimizer)
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    optimizer.step()

    assert client.worker.steps == [1, 2]


def test_sam_in_two_calls_is_one_step_with_the_second_weights() -> None:
    model = _model()
    optimizer = Sharpness(model.parameters(), SGD, lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
        assert _is_last(client, model)

    assert client.worker.steps == [1, 2]


def test_accumulating_wrapper_calls_are_no_steps() -> None:
    model = _model()
    optimizer = Forwarding(SGD(model.parameters(), lr=0.1), accumulate=3)
    client = _client()
    client.attach(model, optimizer)
    for _ in range(7):
        optimizer.step()

    assert client.worker.steps == [1, 2]


@pytest.mark.parametrize("order", [1, -1], ids=["wrapper first", "inner first"])
def test_wrapper_and_its_inner_optimizer_are_one(order: int) -> None:
    model = _model()
    inner = SGD(model.parameters(), lr=0.1)
    wrapper: Any = ScheduleFree(inner)
    client = _client()
    client.attach(model, [wrapper, inner][::order])
    wrapper.step()

    assert client.worker.steps == [1]
    assert _is_last(client, model)


def test_failed_outer_step_is_no_step_and_the_next_one_is() -> None:
    model = _model()
    optimizer = Sharpness(model.parameters(), SGD, lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    parameters = optimizer.param_groups[0].pop("params")
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.param_groups[0]["params"] = parameters

    optimizer.step()
    optimizer.first_step()
    optimizer.second_step()

    assert client.worker.steps == [1, 2]


class Broken(Adam):
    """Hooked by torch, which fails in its step: the tables of hooks are missing."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]


class DeepSpeedOptimizerWrapper(Forwarding):
    """Named as Accelerate's."""


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda model: Broken(model.parameters()), r"super\(\).__init__"),
        (lambda model: DeepSpeedOptimizerWrapper(SGD(model.parameters(), lr=0.1)), r"update\(model, step\)"),
        (lambda model: Slotted(SGD(model.parameters(), lr=0.1)), r"Slotted has __slots__.*update\(model, step\)"),
        (lambda model: Optimizer(model.parameters(), {}), r"no step\(\) of its own.*update\(model, step\)"),
        (lambda model: model, r"Linear is not a torch\.optim\.Optimizer"),
        (lambda model: [SGD(model.parameters(), lr=0.1), None], "NoneType is not"),
        (lambda model: [], "empty list"),
    ],
    ids=["no tables", "deepspeed", "slots", "no step", "a model", "None in a list", "empty"],
)
def test_unsupported_optimizer_is_refused_before_joining(make: Callable[[nn.Module], Any], text: str) -> None:
    Adam([nn.Parameter(torch.zeros(1))])  # has torch hook the class
    model = _model()
    client = _client()

    with pytest.raises(SettingsError, match=text):
        client.attach(model, make(model))
    assert client.worker.joins == []
    assert client.stats()["client"] == "open"


@pytest.mark.parametrize("kept", [False, True], ids=["the old one is gone", "the old one is kept"])
def test_new_optimizer_in_phase_two_is_followed_and_logged_once(kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.1)
    old = [optimizer] if kept else []
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    optimizer = Adam(model.parameters())
    gc.collect()
    for _ in range(3):
        optimizer.step()

    assert client.worker.steps == ([1] if old else [1, 2, 3, 4])
    assert client.finish()
    assert client.worker.steps[-1] == 4
    assert _is_last(client, model)
    assert ["Adam, which attach() was not given" in text for text in _errors(caplog)] == [True, False][: 1 + kept]
    assert ["counted by Adam" in text for text in _errors(caplog)] == [False, True][: 1 + kept]


def test_idle_first_optimizer_passes_the_count_on() -> None:
    model, other = _model(), _model()
    first, second = SGD(other.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(nn.ModuleList([model, other]), [first, second])
    for _ in range(150):
        second.step()

    assert client.steps == 150
    assert client.worker.steps[-1] >= 149


@pytest.mark.parametrize("ending", ["finish", "checkpoint"])
def test_idle_first_optimizer_does_not_lose_the_others_steps(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    gan = Gan()
    first, second = SGD(gan.critic.parameters(), lr=0.1), SGD(gan.generator.parameters(), lr=0.1)
    client = _client()
    client.attach(gan, [first, second])
    for _ in range(5):
        gan.zero_grad()
        _loss(gan).backward()
        second.step()

    assert client.checkpoint(5) if ending == "checkpoint" else client.finish()
    assert client.worker.steps == [5]
    assert _is_last(client, gan)
    assert ["steps are now counted by SGD" in text for text in _errors(caplog)] == [True]


def test_optimizer_of_another_model_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    model, other = _model(), nn.Linear(9, 9)
    optimizer, foreign = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    for _ in range(20):
        foreign.step()
    optimizer.step()
    foreign.add_param_group({"params": list(model.parameters())})
    foreign.step()

    assert client.worker.steps == [1]
    assert [text.split(",")[0] for text in _errors(caplog)] == ["ema: the model is trained by SGD"]


def test_training_a_copy_of_the_model_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    copied = copy.deepcopy(model)
    optimizer = SGD(copied.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.step()

    assert _errors(caplog) == []
    assert client.finish()
    assert ["a copy of the attached model is trained" in text for text in _errors(caplog)] == [True]
    assert client.worker.steps == [1]


def test_deep_copy_of_a_followed_optimizer_steps_itself() -> None:
    model = _model()
    optimizer = Bare(model.parameters(), tables=False)
    client = _client()
    client.attach(model, optimizer)
    before = model.weight.detach().clone()

    clone = copy.copy(optimizer)
    clone.param_groups = [{"params": [nn.Parameter(torch.zeros(2))]}]
    clone.step()

    assert torch.equal(model.weight, before)
    assert client.worker.steps == []


def test_replaced_optimizer_is_freed() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    weak = next(iter(_attachment_of(client)._members.keyrefs()))
    del optimizer
    gc.collect()

    assert weak() is None


class Gan(nn.Module):
    """Two models that are trained in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, 2)
        self.critic = nn.Linear(2, 1)


def _loss(gan: Gan) -> Tensor:
    loss: Tensor = gan.critic(gan.generator(torch.ones(1, 2))).square().sum()
    return loss


@pytest.mark.parametrize("first", ["generator", "critic"])
@pytest.mark.parametrize("loop", ["gc", "cg", "gccccc", "cccccg"])
@pytest.mark.parametrize("ending", ["finish", "checkpoint"])
def test_last_snapshot_of_several_optimizers_has_the_final_weights(
    first: str, loop: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    gan = Gan()
    optimizers = {"g": SGD(gan.generator.parameters(), lr=0.1), "c": SGD(gan.critic.parameters(), lr=0.1)}
    order = "gc" if first == "generator" else "cg"
    client = _client()
    client.attach(gan, [optimizers[name] for name in order])
    for _ in range(4):
        for name in loop:
            gan.zero_grad()
            _loss(gan).backward()
            optimizers[name].step()
    steps = client.steps

    assert client.checkpoint(steps) if ending == "checkpoint" else client.finish()
    assert client.worker.steps == list(range(1, steps + 1))
    assert steps == 4 * loop.count(order[0])
    assert _is_last(client, gan)
    assert _errors(caplog) == []


def test_unattached_second_optimizer_is_awaited_after_the_first_round(caplog: pytest.LogCaptureFixture) -> None:
    gan = Gan()
    first, second = SGD(gan.generator.parameters(), lr=0.1), SGD(gan.critic.parameters(), lr=0.1)
    client = _client()
    client.attach(gan, first)
    for _ in range(3):
        gan.zero_grad()
        _loss(gan).backward()
        first.step()
        second.step()

    assert client.worker.steps == [1, 2, 3]
    assert _is_last(client, gan)
    assert len(_errors(caplog)) == 1


def test_optimizer_of_another_thread_is_not_followed() -> None:
    model = _model()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    thread = threading.Thread(target=other.step)
    thread.start()
    thread.join(30)

    assert client.finish()
    assert client.worker.steps == [1]


def test_removing_the_attachment_sends_the_pending_step() -> None:
    gan = Gan()
    first, second = SGD(gan.generator.parameters(), lr=0.1), SGD(gan.critic.parameters(), lr=0.1)
    client = _client()
    handle = client.attach(gan, [first, second])
    _loss(gan).backward()
    first.step()
    second.step()
    assert client.worker.steps == []

    handle.remove()

    assert client.worker.steps == [1]
    assert _is_last(client, gan)


def test_resized_vocabulary_with_a_new_optimizer_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    model[0] = nn.Embedding(6, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.step()

    assert client.steps == 4
    assert client.stats()["skipped"]["changed"] == 3
    assert len(_errors(caplog)) == 2, "a new optimizer, and another model"


def test_optimizers_made_in_each_round_share_one_place(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    client = _client()
    client.attach(model, SGD(model.parameters(), lr=0.1))
    for _ in range(20):
        SGD(model.parameters(), lr=0.1).step()

    assert client.worker.steps == list(range(1, 21))
    assert len(_attachment_of(client)._steppers) == 1
    assert len(_errors(caplog)) == 3


class Groupless(Optimizer):
    """Keeps its parameters elsewhere."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            self.parameter.sub_(1.0)


def test_optimizer_without_groups_is_followed() -> None:
    model = _model()
    optimizer = Groupless(model.weight)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()

    assert client.worker.steps == [1]
    assert _is_last(client, model)


def test_manual_writes_after_attach_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(model, optimizer)
    optimizer.step()
    for second in range(1, 30):
        with torch.no_grad():
            model.weight.sub_(0.1)
        client.worker.look(float(second))

    assert ["no step has been counted since step 1" in text for text in _errors(caplog)] == [True]


def test_optimizer_of_another_model_is_reported_at_attach(caplog: pytest.LogCaptureFixture) -> None:
    _client().attach(_model(), SGD(_model().parameters(), lr=0.1))

    assert ["holds no parameter of the model" in record.message for record in caplog.records] == [True]
