"""Every rule, and every way to choose what is averaged, from a trainer's client to a downloaded file."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_reader import Reader
from support.dense import dense_shares
from support.processes import ServerProcess
from trainer_client import EmaClient, PlanError, SettingsError

_STEPS = 40
_RULES = [
    "ema:0.9",
    "ema:0.9,init=start,name=from-start",
    "ema:half_life=4",
    "ema:half_life_samples=160",
    "ema:half_life_epochs=0.5,acc=float64",
    "ema:0.99,warmup=timm,update_after=5",
    "ema:0.99,warmup=tf,init=start",
    "ema:0.99,warmup=exponential,tau=9",
    "ema:half_life=inf,warmup=half_life,fraction=0.3",
    "ema:0.9,warmup=debias",
    "power:sigma_rel=0.1",
    "power:gamma=3",
    "swa",
    "swa:start=12,every=5",
    "window:7",
    "window:3,every=6",
    "wsd:start=10,steps=20",
    "wsd:start=10,steps=60,shape=cosine",
    "wsd:start=3,steps=37,shape=sqrt",
    "bema:every=3",
    "bema:every=7,ema_power=0.3,bias_power=0.6,lag=2,multiplier=0.5,min=0.4,update_after=6",
]
_UNITS = StepUnits(samples_per_step=32, steps_per_epoch=11)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server; each test has a run of its own."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return str(re.sub(r"[^a-z0-9]+", "-", request.node.name)[:90].strip("-"))


def _client(server: ServerProcess, run: str, averages: list[str], **given: Any) -> EmaClient:
    return EmaClient(server.zmq, run, averages, when_behind="wait", **given)


def _loaded(server: ServerProcess, run: str, average: str) -> dict[str, Tensor]:
    with Reader(server.http) as reader:
        return reader.load(reader.version(run, average))


class _OneHot(nn.Module):
    """Weights that are 1 at the place of the current step and 0 elsewhere: an average of them is its own shares."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(_STEPS + 1))
        self.at(0)

    def at(self, step: int) -> nn.Module:
        with torch.no_grad():
            self.w.zero_()[step] = 1.0
        return self


def _shares(server: ServerProcess, run: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return _loaded(server, run, name)["w"].double().numpy()


@pytest.mark.parametrize("sent", [1, 4], ids=["every-step", "every-fourth"])
def test_version_holds_each_step_with_the_share_of_its_rule(server: ServerProcess, run: str, sent: int) -> None:
    """A snapshot that stands for four steps has the shares of all four."""
    model, units = _OneHot(), {"samples_per_step": 32, "steps_per_epoch": 11}
    with _client(server, run, _RULES, every=sent, **units) as ema:
        assert ema.set(model)
        for step in range(1, _STEPS + 1):
            ema.update(model.at(step))

    for spec in _RULES:
        rule = parse_average(spec)
        dense = dense_shares(rule, 0, _STEPS, _UNITS)[_STEPS]
        expected = np.zeros(_STEPS + 1)
        expected[0] = dense[0]
        expected[sent::sent] = dense[1:].reshape(-1, sent).sum(axis=1)
        assert np.abs(_shares(server, run, rule.name) - expected).max() < 1e-6, spec


def test_attach_sends_initial_weights_for_rules_that_begin_with_them(server: ServerProcess, run: str) -> None:
    model = nn.Linear(3, 2)
    optimizer, before = SGD(model.parameters(), 0.5), model.weight.detach().clone()
    with _client(server, run, ["raw", "ema:0.75", "ema:0.75,init=start", "bema"]) as ema:
        ema.attach(model, optimizer)
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()

    first, start, raw = (_loaded(server, run, name)["weight"] for name in ("ema-0.75", "ema-0.75-init-start", "raw"))
    assert torch.equal(raw, model.weight)
    assert torch.equal(first, raw), "the first update copies"
    assert torch.allclose(start, 0.75 * before + 0.25 * raw)
    assert not torch.allclose(start, raw)
    assert torch.equal(_loaded(server, run, "bema")["weight"], before), "its first update is at step 400"


def test_manual_updates_begin_with_the_first_and_warn(
    server: ServerProcess, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING, "ema"), _client(server, run, ["ema:0.75,init=start"]) as ema:
        ema.update(model)

    assert "no set(model) came before it" in caplog.text
    assert torch.equal(_loaded(server, run, "ema-0.75-init-start")["weight"], model.weight)


def test_decay_of_a_length_in_samples_or_epochs_is_logged_when_joining(
    server: ServerProcess, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    rules = ["ema:half_life_samples=5000", "ema:half_life_epochs=2", "ema:0.9"]
    with (
        caplog.at_level(logging.INFO, "ema"),
        _client(server, run, rules, samples_per_step=50, steps_per_epoch=7) as ema,
    ):
        ema.update(nn.Linear(3, 2))

    logged = [record.getMessage() for record in caplog.records if "half-life" in record.getMessage()]
    assert logged == [
        f"ema: average {name} has a half-life of {steps} steps, a decay of {0.5 ** (1 / steps):.10g} at each"
        for name, steps in (("ema-half_life_samples-5000", 100), ("ema-half_life_epochs-2", 14))
    ]


def test_length_at_its_limit_is_averaged_and_one_beyond_is_refused(server: ServerProcess, run: str) -> None:
    """Divided by the samples per step it is less than any step; neither end may stumble over that later."""
    model = _OneHot()
    with _client(server, run, ["ema:half_life_samples=1e-9,name=none"], samples_per_step=9e14) as ema:
        for step in (1, 2, 3):
            ema.update(model.at(step))
    with Reader(server.http) as reader:
        shown = reader.averages.of(run)[0]

    assert shown.decay == 0.0
    assert _shares(server, run, "none")[3] == 1.0
    with pytest.raises(SettingsError, match="half_life_samples"):
        _client(server, run, ["ema:half_life_samples=1e-323,name=none"], samples_per_step=32)


def test_set_during_a_run_replaces_every_average(server: ServerProcess, run: str) -> None:
    model = _OneHot()
    with _client(server, run, ["ema:0.9", "swa"]) as ema:
        for step in (1, 2, 3):
            ema.update(model.at(step))
        assert ema.set(model.at(7))
        ema.update(model.at(4))

    expected = {"ema-0.9": (0.9, 0.1), "swa": (3 / 4, 1 / 4)}
    for name, (kept, new) in expected.items():
        assert _shares(server, run, name)[[7, 4]] == pytest.approx((kept, new), abs=1e-6)


class _Adapted(nn.Module):
    """A frozen layer with a trained adapter, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.lora_A = nn.Parameter(torch.randn(2, 4))
        self.lora_B = nn.Parameter(torch.zeros(4, 2))
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.base(x) + x @ self.lora_A.T @ self.lora_B.T)
        return out


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"trainable_only": True}, {"lora_A", "lora_B"}),
        ({"include": ["lora_*", "norm.*"], "exclude": "*.num_batches_tracked"},
         {"lora_A", "lora_B", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}),
    ],
    ids=["trainable", "patterns"],
)  # fmt: skip
def test_files_of_a_partial_stream_hold_exactly_the_selected_tensors(
    server: ServerProcess, run: str, given: dict[str, Any], names: set[str]
) -> None:
    model = _Adapted()
    optimizer = SGD([model.lora_A, model.lora_B], 0.1)
    with _client(server, run, ["raw", "ema:0.5"], **given) as ema:
        ema.attach(model, optimizer)
        for _ in range(3):
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()

    for average in ("raw", "ema-0.5"):
        assert set(_loaded(server, run, average)) == names
    assert torch.equal(_loaded(server, run, "raw")["lora_A"], model.lora_A)


def test_average_of_some_tensors_copies_the_rest(server: ServerProcess, run: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with _client(server, run, ["ema:0.5,include=0.*,name=head", "ema:0.5,exclude=*.bias,name=weights"]) as ema:
        ema.update(model)
        old = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.update(model)

    for average, averaged in (("head", {"0.weight", "0.bias"}), ("weights", {"0.weight", "1.weight"})):
        found = _loaded(server, run, average)
        assert {name for name in old if torch.allclose(found[name], old[name] + 0.5)} == averaged
        assert {name for name in old if torch.equal(found[name], model.state_dict()[name])} == set(old) - averaged


def test_unmatched_pattern_of_an_average_is_reported_when_joining(server: ServerProcess, run: str) -> None:
    with (
        _client(server, run, ["ema:0.5,include=haed.*,name=head"]) as ema,
        pytest.raises(PlanError, match=r"'haed\.\*' of include= of average 'head' .* weight, bias"),
    ):
        ema.update(nn.Linear(2, 2))


def test_missing_step_unit_is_an_error_before_anything_is_opened() -> None:
    with pytest.raises(SettingsError, match="pass samples_per_step= to EmaClient"):
        EmaClient("tcp://127.0.0.1:9", "run", ["ema:half_life_samples=1000"])
