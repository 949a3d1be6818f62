"""A small training with Lightning, for tests, from the package that is asked for.

The model has batch norm and dropout, whose statistics and random numbers show what else reads the training's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

_SAMPLES = 32
BATCH = 4
BATCHES = _SAMPLES // BATCH  # of an epoch


def network() -> nn.Sequential:
    """The averaged network."""
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 1))


def module_class(package: str) -> type[Any]:
    """The LightningModule of one of Lightning's packages."""
    base: Any = importlib.import_module(package).LightningModule

    class Module(base):  # type: ignore[misc]
        """Regression, with `net` as its network."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = network()

        def forward(self, inputs: Tensor) -> Tensor:
            predicted: Tensor = self.net(inputs)
            return predicted

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            return mse_loss(self(inputs), targets)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            inputs, targets = batch
            torch.rand(1)  # random numbers that a training without a second validation does not use
            self.log("val_loss", mse_loss(self(inputs), targets))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    return Module


def loader(*, shuffle: bool = False) -> Any:
    """The batches of an epoch, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(_SAMPLES, 3, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), BATCH, shuffle=shuffle)


def recorder(package: str, path: str = "net") -> Any:
    """A callback whose `states` has the weights of the sub-module after each step, as float64."""
    base: Any = importlib.import_module(package).Callback

    class Recorder(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []
            self._steps = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            if trainer.global_step > self._steps:
                self._steps = trainer.global_step
                state = pl_module.get_submodule(path).state_dict()
                self.states.append({name: value.detach().clone().double() for name, value in state.items()})

    return Recorder()


def trainer(package: str, folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A Trainer that prints and logs nothing."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_epochs": 2}
    quiet |= {"num_sanity_val_steps": 0, "enable_checkpointing": False}
    return importlib.import_module(package).Trainer(callbacks=list(callbacks), **(quiet | options))


def replayed(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average of these weights in float64, beginning with the first; integers are copied."""
    average = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            copied = name.endswith("num_batches_tracked")
            average[name] = value if copied else decay * average[name] + (1 - decay) * value
    return average
