"""A script that trains with Lightning's `ModelParallelStrategy` (FSDP2) on two ranks.

    lightning_sharded.py FOLDER RUN EPOCHS

Rank 0 saves the whole network after each step as FOLDER/step-N.pt. A checkpoint FOLDER/last.ckpt is resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.lightning_training import loader, module_class, trainer
from trainer_client.lightning import EmaCallback


class Module(module_class("lightning.pytorch")):  # type: ignore[misc]
    """The module of the other tests, sharded."""

    def configure_model(self) -> None:
        if not isinstance(next(self.net.parameters()), DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Saver(pl.Callback):  # type: ignore[misc]
    """Gathers and saves the weights after each step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        state = pl_module.net.state_dict()
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        if trainer.global_rank == 0:
            torch.save(whole, self._folder / f"step-{trainer.global_step}.pt")


def main() -> None:
    folder, run, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    last = folder / "last.ckpt"
    fitted = trainer(
        "lightning.pytorch",
        folder,
        EmaCallback(run=run, decay=0.8, module="net", when_behind="wait"),
        ModelCheckpoint(folder, "{step}", save_last=True),
        Saver(folder),
        enable_checkpointing=True,
        max_epochs=epochs,
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
    )
    fitted.fit(Module(), loader(), loader(), ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main()
