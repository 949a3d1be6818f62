"""The rule `bema` gives the weights of TRL's `BEMACallback` in a real training of 200 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.oracle import EPS32
from support.server_core import durable, joined, manifest_of, running_core, versions_by_average

pytest.importorskip("transformers")
pytest.importorskip("trl")

from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.callbacks import BEMACallback

_STEPS = 200


class _Config(PretrainedConfig):
    model_type = "little"


class _Model(PreTrainedModel):
    config_class = _Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Linear(3, 1)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.outer(torch.tanh(self.inner(x))).squeeze(-1)
        return {"loss": ((found - labels) ** 2).mean(), "logits": found}


class _Record(TrainerCallback):
    """The weights after each step, those of before the first as step 0."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **given: Any) -> None:
        self._keep(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **given: Any) -> None:
        self._keep(state.global_step, model)

    def _keep(self, step: int, model: nn.Module) -> None:
        self.weights[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _trained(tmp_path: Path, bema: Any) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(0)
    record = _Record()
    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(32)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=_STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(_Model(_Config()), arguments, train_dataset=data, callbacks=[record, bema])
    trainer.train()
    return record.weights


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"update_freq": 10}, "bema:every=10"),
        ({"update_freq": 1}, "bema:every=1"),
        ({"update_freq": 7, "update_after": 31}, "bema:every=7,update_after=31"),
        ({"update_freq": 3, "ema_power": 0.8, "bias_power": 0.4, "lag": 2, "multiplier": 0.5, "min_ema_multiplier": 0.1},  # noqa: E501
         "bema:every=3,ema_power=0.8,bias_power=0.4,lag=2,multiplier=0.5,min=0.1"),
        ({"update_freq": 5, "bias_power": 0.0}, "bema:every=5,bias_power=0"),
        ({"update_freq": 5, "ema_power": 0.0}, "bema:every=5,ema_power=0"),
        ({}, "bema"),
    ],
)  # fmt: skip
def test_bema_equals_the_callback(tmp_path: Path, given: dict[str, Any], rule: str) -> None:
    bema = BEMACallback(**given)
    weights = _trained(tmp_path, bema)
    with running_core(tmp_path / "data") as core:
        joined(core.join("r", manifest_of(weights[0]), [rule]))
        core.apply("r", 0, weights[0], "set")
        for step in range(1, _STEPS + 1):
            core.apply("r", step, weights[step])
        (version,) = versions_by_average(durable(core.publish("r"))).values()
        found = core.load(version)

    expected = bema.running_model.state_dict()
    if "update_freq" not in given:  # no update in 200 steps: the callback has the initial weights
        assert all(torch.equal(found[name], weights[0][name]) for name in found)
    assert set(found) == set(expected)
    for name, value in expected.items():
        largest = max(weights[step][name].abs().max().item() for step in weights)
        assert (found[name] - value).abs().max().item() <= 64 * EPS32 * largest, name
