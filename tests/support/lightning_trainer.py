"""A script that trains with Lightning and `EmaCallback`, to be killed, or run on several ranks.

    lightning_trainer.py FOLDER RUN DEVICES [KILL_AT]

Rank 0 saves the network after each step as FOLDER/step-N.pt, and kills its process after step KILL_AT. A checkpoint
FOLDER/last.ckpt is resumed. At its end each rank writes its metrics to FOLDER/metrics-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from support.lightning_training import loader, module_class, trainer
from trainer_client.lightning import EmaCallback

SAVE_EVERY = 3


class Saver(pl.Callback):  # type: ignore[misc]
    """Saves the weights after each step, and kills the process after one of them."""

    def __init__(self, folder: Path, kill_at: int, ema: EmaCallback) -> None:
        self._folder, self._kill_at, self._ema = folder, kill_at, ema

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if trainer.global_rank == 0:
            torch.save(pl_module.net.state_dict(), self._folder / f"step-{trainer.global_step}.pt")
            if trainer.global_step == self._kill_at:
                client = self._ema._client
                assert client is not None
                assert client.flush()  # the snapshot of this step is sent by another thread
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, run, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    kill_at = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    last = folder / "last.ckpt"
    ema = EmaCallback(run=run, decay=0.8, module="net", when_behind="wait", validate="ema")
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_last=True, save_top_k=-1)
    stoppings = [EarlyStopping(name, patience=100) for name in ("ema/val_loss", "raw/loss")]  # one is never reported
    fitted = trainer(
        "lightning.pytorch",
        folder,
        ema,
        checkpoint,
        Saver(folder, kill_at, ema),
        *stoppings,
        enable_checkpointing=True,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )
    fitted.fit(module_class("lightning.pytorch")(), loader(), loader(), ckpt_path=last if last.exists() else None)
    metrics = {name: float(value) for name, value in fitted.callback_metrics.items()}
    (folder / f"metrics-{fitted.global_rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
