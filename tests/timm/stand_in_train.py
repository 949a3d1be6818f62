"""The parts of timm's train.py that handle its average. Run with a timm; see `test_script.py`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--model-ema-force-cpu", action="store_true")
parser.add_argument("--model-ema-decay", type=float, default=0.9998)
parser.add_argument("--model-ema-warmup", action="store_true")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--resume", default="")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--fail-after", type=int, default=-1)


def main() -> None:
    """Train on noise; save a checkpoint after each epoch, and print the average's metric."""
    args = parser.parse_args()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    task: Any = importlib.import_module("timm.task").ClassificationTask(model)
    first = 0
    checkpoint = torch.load(args.resume) if args.resume else None
    if checkpoint:
        model.load_state_dict(checkpoint["state_dict"])
        first = checkpoint["epoch"] + 1
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
        if checkpoint:
            task.get_trainable_module(ema=True).module.load_state_dict(checkpoint["state_dict_ema"])
    for epoch in range(first, args.epochs):
        _train(task, model, epoch)
        saved = {"epoch": epoch, "state_dict": model.state_dict()}
        ema = task.get_trainable_module(ema=True)
        if ema is not None and not args.model_ema_force_cpu:
            ema.eval()
            torch.manual_seed(99)
            print(f"epoch {epoch} (EMA) {ema(torch.randn(32, 6)).square().mean().item():.6f}", flush=True)
        if ema is not None:
            saved["state_dict_ema"] = ema.module.state_dict()
        torch.save(saved, args.output / f"checkpoint-{epoch}.pth.tar")
        if epoch == args.fail_after:
            raise RuntimeError("the disk of the trainer is full")


def _train(task: Any, model: nn.Module, epoch: int) -> None:
    torch.manual_seed(1000 + epoch)
    for step in range(20):
        model.train()
        model(torch.randn(16, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        task.update_ema(step=epoch * 20 + step + 1)


if __name__ == "__main__":
    main()
