"""Each row of the table in docs/guides/optimizers.md, with the real library: what is sent after each step."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer

from support.fake_worker import OfflineClient
from support.processes import Process, ServerProcess
from support.recorded import Recorder
from trainer_client import EmaClient, SettingsError

_PAGE = Path(__file__).parents[2] / "docs" / "guides" / "optimizers.md"
_SHARDED = Path(__file__).parents[1] / "support" / "sharded_optimizers.py"

_ROWS: dict[str, Callable[[pytest.LogCaptureFixture], None]] = {}

Iteration = Callable[[nn.Module, Any], object]


def _row(label: str) -> Callable[[Callable[[pytest.LogCaptureFixture], None]], None]:
    def add(test: Callable[[pytest.LogCaptureFixture], None]) -> None:
        _ROWS[label] = test

    return add


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(3, 4)).square().mean()
    return loss


def _backward(model: nn.Module, optimizer: Any = None) -> Tensor:
    """Gradients of a new batch, in place of the old ones."""
    model.zero_grad()
    loss = _loss(model)
    loss.backward()
    return loss


def _plain(model: nn.Module, optimizer: Any) -> None:
    _backward(model)
    optimizer.step()


def _client(run: str = "r") -> OfflineClient:
    return OfflineClient("tcp://127.0.0.1:5555", run=run)


def _is_last(client: OfflineClient, model: nn.Module) -> bool:
    """Whether the newest snapshot has the weights that the model has now."""
    sent = client.worker.sent(-1)
    return all(torch.equal(sent[name], tensor) for name, tensor in model.state_dict().items())


def _follow(model: nn.Module, given: Any, iterate: Iteration = _plain, iterations: int = 5, per_step: int = 1) -> None:
    """Each `per_step` iterations are one step, which is sent once, with the weights that the model has after it."""
    client = _client()
    handle = client.attach(model, given)
    for count in range(1, iterations * per_step + 1):
        before = copy.deepcopy(model.state_dict())
        iterate(model, given)
        assert client.worker.steps == list(range(1, count // per_step + 1))
        if count % per_step == 0:
            assert _is_last(client, model)
            assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    handle.remove()


def _refuse(given: Any, text: str, model: nn.Module | None = None) -> None:
    client = _client()
    with pytest.raises(SettingsError, match=text):
        client.attach(_model() if model is None else model, given)
    assert client.stats()["client"] == "open"


def _step_in_backward(optimizers: Mapping[nn.Parameter, Any]) -> None:
    """The recipe of torch's tutorial: each parameter's optimizer steps as soon as its gradient is there."""

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@_row("any of `torch.optim`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    for kind in (SGD, AdamW, torch.optim.Adafactor, torch.optim.RMSprop):
        model = _model()
        _follow(model, kind(model.parameters(), lr=0.01))


@_row("gradient accumulation")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = _model(), iter(range(1, 100))

    def iterate(model: nn.Module, optimizer: Any) -> None:
        _loss(model).backward()
        if next(batches) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()

    _follow(model, SGD(model.parameters(), lr=0.1), iterate, per_step=3)


def _scaled(model: nn.Module, optimizer: Optimizer) -> list[int]:
    """The steps sent after each of four iterations with a gradient scaler, of which the second overflows."""
    client, scaler = _client(), torch.amp.GradScaler("cpu", init_scale=4.0)
    client.attach(model, optimizer)
    sent = []
    for overflows in (False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(_loss(model) * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        sent.append(client.worker.steps[-1])
        assert _is_last(client, model)
    return sent


@_row("`GradScaler`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    assert _scaled(model, AdamW(model.parameters())) == [1, 1, 2, 3]


@_row("`GradScaler` with `fused=True`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    assert _scaled(model, Adam(model.parameters(), fused=True)) == [1, 2, 3, 4]


@_row("`LBFGS`, and any `step(closure)`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    for kind in (LBFGS, SGD):
        model = _model()
        _follow(model, kind(model.parameters(), lr=0.1), lambda model, each: each.step(lambda: _backward(model)))


@_row("several optimizers of one model (Muon and AdamW, a GAN)")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    matrices = Muon([each for each in model.parameters() if each.ndim == 2], lr=0.01)
    others = AdamW([each for each in model.parameters() if each.ndim != 2])

    def iterate(model: nn.Module, optimizers: Iterable[Any]) -> None:
        _backward(model)
        for optimizer in optimizers:
            optimizer.step()

    client = _client()
    client.attach(model, [matrices, others])
    for _ in range(3):
        iterate(model, (matrices, others))
    assert client.finish()
    assert client.worker.steps == [1, 2, 3]
    assert _is_last(client, model)


@_row("two models, a client for each")
def _(caplog: pytest.LogCaptureFixture) -> None:
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = {generator: SGD(generator.parameters(), lr=0.1), critic: SGD(critic.parameters(), lr=0.1)}
    clients = {generator: _client("generator"), critic: _client("critic")}
    for model, client in clients.items():
        client.attach(model, optimizers[model])
    for _ in range(20):
        for model in (generator, critic, critic):
            optimizers[model].zero_grad()
            critic(generator(torch.ones(1, 2))).square().sum().backward()
            optimizers[model].step()
            assert _is_last(clients[model], model)
    assert all(client.finish() for client in clients.values())
    assert [client.steps for client in clients.values()] == [20, 40]
    assert _warnings(caplog) == []


@_row("Accelerate: `AcceleratedOptimizer`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    accelerate = pytest.importorskip("accelerate")
    optim = pytest.importorskip("pytorch_optimizer")
    accelerator = accelerate.Accelerator(cpu=True)
    for make in (SGD, lambda parameters, lr: optim.Lookahead(SGD(parameters, lr=lr), k=2)):
        model, optimizer = accelerator.prepare(inner := _model(), make(inner.parameters(), lr=0.1))
        _follow(model, optimizer)
        model = _model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaled = accelerate.optimizer.AcceleratedOptimizer(make(model.parameters(), lr=0.1), scaler=scaler)
        _follow(model, scaled, lambda model, each: (each.scaler.scale(_backward(model)), each.step()))


@_row("Lightning and Fabric")
def _(caplog: pytest.LogCaptureFixture) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    inner = _model()
    model, optimizer = fabric.setup(inner, SGD(inner.parameters(), lr=0.1))
    _follow(inner, optimizer, lambda _, each: _plain(model, each))


@_row("SAM, by `step(closure)`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    optim = pytest.importorskip("pytorch_optimizer")
    model = _model()

    def iterate(model: nn.Module, optimizer: Any) -> None:
        _backward(model)
        optimizer.step(lambda: _backward(model))

    _follow(model, optim.SAM(model.parameters(), SGD, lr=0.1), iterate)


@_row("SAM, by `first_step()` and `second_step()`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    optim = pytest.importorskip("pytorch_optimizer")

    def iterate(model: nn.Module, optimizer: Any) -> None:
        _backward(model)
        optimizer.first_step(zero_grad=True)
        _backward(model)
        optimizer.second_step(zero_grad=True)

    model = _model()
    _follow(model, optim.SAM(model.parameters(), SGD, lr=0.1), iterate)
    model = _model()
    _follow(model, optim.WSAM(model, model.parameters(), SGD, lr=0.1, decouple=True), iterate)


@_row("Lookahead")
def _(caplog: pytest.LogCaptureFixture) -> None:
    optim = pytest.importorskip("pytorch_optimizer")
    for k in (2, 3):
        model = _model()
        _follow(model, optim.Lookahead(SGD(model.parameters(), lr=0.1), k=k))


@_row("schedule-free")
def _(caplog: pytest.LogCaptureFixture) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    optim = pytest.importorskip("pytorch_optimizer")
    makers: tuple[Callable[[Iterable[Tensor]], Any], ...] = (
        lambda parameters: schedulefree.SGDScheduleFree(parameters, lr=0.1),
        lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.1),
        lambda parameters: schedulefree.ScheduleFreeWrapper(SGD(parameters, lr=0.1)),
        lambda parameters: optim.ScheduleFreeSGD(parameters, lr=0.1),
        lambda parameters: optim.ScheduleFreeWrapper(SGD(parameters, lr=0.1)),
    )
    for make in makers:
        caplog.clear()
        model = _model()
        optimizer = make(model.parameters())
        optimizer.train()
        _follow(model, optimizer)
        assert sum("evaluates other weights than it trains" in text for text in _warnings(caplog)) == 1


@_row("half precision with master weights (Apex-like)")
def _(caplog: pytest.LogCaptureFixture) -> None:
    optim = pytest.importorskip("pytorch_optimizer")
    model = _model().bfloat16()

    def iterate(model: nn.Module, optimizer: Any) -> None:
        model.zero_grad()
        optimizer.backward(model(torch.randn(3, 4, dtype=torch.bfloat16)).square().mean(), update_main_grads=True)
        optimizer.clip_main_grads(1.0)
        optimizer.step()

    _follow(model, optim.optimizer.fp16.SafeFP16Optimizer(SGD(model.parameters(), lr=0.5)), iterate)


@_row("`ZeroRedundancyOptimizer`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    assert all(f"rank {rank}: ZeroRedundancyOptimizer is followed" in _of_two_ranks() for rank in range(2))
    assert all(f"rank {rank}: overlap_with_ddp is refused" in _of_two_ranks() for rank in range(2))


@_row("`PostLocalSGDOptimizer`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    assert all(f"rank {rank}: PostLocalSGDOptimizer is followed" in _of_two_ranks() for rank in range(2))


@functools.cache
def _of_two_ranks() -> str:
    """What the script for both optimizers prints; lines of two processes may run into each other."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(_SHARDED))
    with Process(*command) as ranks:
        assert ranks.wait(120.0) == 0, list(ranks.errors)
    return "".join(ranks.lines)


@_row("`bitsandbytes`, `torchao.optim`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    for package, kind in (("bitsandbytes", "AdamW8bit"), ("torchao", "AdamW8bit")):
        optim = pytest.importorskip(f"{package}.optim")
        model = nn.Linear(64, 64)
        _follow(model, getattr(optim, kind)(model.parameters(), lr=0.01), _plain_of(64))


def _plain_of(width: int) -> Iteration:
    def iterate(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(3, width)).square().mean().backward()
        optimizer.step()

    return iterate


@_row("an optimizer for each parameter, stepping in `backward()`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    optimizers: dict[nn.Parameter, Optimizer] = {each: SGD([each], lr=0.1) for each in model.parameters()}
    _step_in_backward(optimizers)
    client = _client()
    client.attach(model, optimizers.values())
    for _ in range(4):
        _loss(model).backward()
    assert client.finish()
    assert client.worker.steps == [1, 2, 3, 4]
    assert _is_last(client, model)


@_row("`LayerWiseDummyOptimizer` of transformers (GaLore, APOLLO)")
def _(caplog: pytest.LogCaptureFixture) -> None:
    parts = pytest.importorskip("transformers.trainer_pt_utils")
    accelerate = pytest.importorskip("accelerate")
    model = _model()
    optimizers: dict[nn.Parameter, Optimizer] = {each: SGD([each], lr=0.1) for each in model.parameters()}
    _step_in_backward(optimizers)
    optimizer = accelerate.Accelerator(cpu=True).prepare(parts.LayerWiseDummyOptimizer(optimizer_dict=optimizers))
    client = _client()
    client.attach(model, optimizer)
    for _ in range(4):
        _loss(model).backward()
        optimizer.step()
    assert client.finish()
    assert client.worker.steps == [1, 2, 3, 4]
    assert _is_last(client, model)
    assert _warnings(caplog) == []


@_row("LOMO, AdaLOMO")
def _(caplog: pytest.LogCaptureFixture) -> None:
    optim = pytest.importorskip("pytorch_optimizer")
    accelerate = pytest.importorskip("accelerate")
    for kind in (optim.LOMO, optim.AdaLOMO):
        model = _model()
        lomo = kind(model)
        for given in (lomo, accelerate.optimizer.AcceleratedOptimizer(lomo)):
            _refuse(given, r"steps inside backward\(\), and not in step\(\): call update\(model, step\)", model)
        client = _client()
        for step in range(1, 4):
            lomo.fused_backward(_loss(model), 0.1)
            client.update(model, step)
            assert _is_last(client, model)


@_row("a fused backward pass (kohya, OneTrainer)")
def _(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)  # patched to step one parameter at a time, and never called
    fused = {each: _Fused(each) for each in model.parameters()}
    _step_in_backward(fused)
    client = _client()
    client.attach(model, optimizer)
    for second in range(1, 15):
        _loss(model).backward()
        client.worker.look(float(second))
    text = r"no step has been counted .* call update\(model, step\)"
    assert [bool(re.search(text, each)) for each in _warnings(caplog)] == [True]


class _Fused:
    """As `step_param` of a patched Adafactor: writes a parameter, and is no torch optimizer."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @torch.no_grad()
    def step(self) -> None:
        assert self.parameter.grad is not None
        self.parameter.sub_(self.parameter.grad, alpha=0.1)

    def zero_grad(self) -> None:
        self.parameter.grad = None


@_row("DeepSpeed: the engine and its optimizers")
def _(caplog: pytest.LogCaptureFixture) -> None:
    # Stand-ins with the names and the module of DeepSpeed's, which does not install everywhere; the classes of
    # DeepSpeed 0.19.8 were refused alike, with ZeRO stages 1 to 3.
    model = _model()
    for name in ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedEngine"):
        kind = type(name, (), {"__module__": "deepspeed.runtime.zero", "optimizer": SGD(model.parameters(), lr=0.1)})
        _refuse(kind(), rf"{name} steps inside DeepSpeed's engine.* call update\(model, step\)", model)


@_row("an optimizer whose class does not call `Optimizer.__init__`")
def _(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Optimizer):
        def __init__(self, parameters: Iterable[Tensor]) -> None:
            self.param_groups = [{"params": list(parameters)}]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad)

    model = _model()
    _follow(model, Own(model.parameters()))


@_row("anything else without a torch optimizer inside")
def _(caplog: pytest.LogCaptureFixture) -> None:
    class Foreign:
        def step(self) -> None:
            """Steps something."""

    _refuse(Foreign(), r"Foreign is not a torch\.optim\.Optimizer and has none inside.* call update\(model, step\)")
    _refuse(Optimizer([torch.zeros(1)], {}), r"Optimizer has no step\(\) of its own: call update\(model, step\)")


@pytest.mark.parametrize("label", _ROWS)
def test_row(label: str, caplog: pytest.LogCaptureFixture) -> None:
    _ROWS[label](caplog)


def test_every_row_of_the_table_is_tested() -> None:
    head = "| optimizer or wrapper | what happens | what to do |\n|---|---|---|\n"
    table = _PAGE.read_text().partition(head)[2].partition("\n\n")[0]

    assert re.findall(r"^\| (.+?) \|", table, flags=re.MULTILINE) == list(_ROWS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("optimizers") / "data") as process:
        yield process


def _streaming(server: ServerProcess, run: str) -> EmaClient:
    return EmaClient(server.zmq, run, ["raw", "ema:0.9"], when_behind="wait")


@pytest.mark.parametrize("kind", ["SAM", "Lookahead", "ScheduleFreeWrapper"])
def test_averages_of_a_wrapped_optimizer_equal_a_float64_replay(server: ServerProcess, kind: str) -> None:
    optim = pytest.importorskip("pytorch_optimizer")
    model, recorder = _model(), Recorder()
    if kind == "SAM":
        optimizer = optim.SAM(model.parameters(), SGD, lr=0.1)
    else:
        optimizer = getattr(optim, kind)(SGD(model.parameters(), lr=0.1))
    getattr(optimizer, "train", bool)()
    ema = _streaming(server, kind)
    ema.attach(model, optimizer)
    for step in range(1, 13):
        _backward(model)
        optimizer.step(lambda: _backward(model))
        recorder.record(step, model)

    assert ema.finish()
    recorder.check(server, kind, list(range(1, 13)))


def test_update_between_eval_and_train_streams_what_schedule_free_evaluates(server: ServerProcess) -> None:
    """The averages are those of x, which is computed here as the paper has it: y = x + (1 - beta) (z - x)."""
    schedulefree = pytest.importorskip("schedulefree")
    model, recorder, beta, rate = nn.Linear(4, 2, bias=False), Recorder(), 0.9, 0.1
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=rate, momentum=beta)
    x = z = model.weight.detach().clone()
    ema = _streaming(server, "evaluated")
    for step in range(1, 9):
        optimizer.train()
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        assert model.weight.grad is not None
        z = z - rate * model.weight.grad
        x = x + (z - x) / step
        optimizer.step()
        optimizer.eval()
        ema.update(model, step)
        assert torch.allclose(model.weight, x, rtol=0, atol=1e-6)
        recorder.record(step, model)

    assert ema.finish()
    recorder.check(server, "evaluated", list(range(1, 9)))
