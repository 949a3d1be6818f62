"""The parts of diffusers' train_unconditional.py that handle its average, with a small model and noise as data."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from support.small_unet import small_unet

parser = argparse.ArgumentParser()
parser.add_argument("--use_ema", action="store_true")
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--checkpointing_steps", type=int, default=4)
parser.add_argument("--resume_from_checkpoint", default="")
parser.add_argument("--kill_after", type=int, default=-1)


def main() -> None:
    """Train; save a checkpoint every few steps, and the average at the end."""
    args = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = small_unet()
    ema_model: Any = None
    if args.use_ema:
        ema_model = EMAModel(
            model.parameters(),
            decay=0.95,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=model.config,
        )
    _register(accelerator, ema_model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    if ema_model is not None:
        ema_model.to(accelerator.device)
    done = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.output_dir / args.resume_from_checkpoint)
        done = int(args.resume_from_checkpoint.split("-")[1])
    for number in range(2 * done, 2 * args.steps):
        _train(accelerator, model, optimizer, number)
        if not accelerator.sync_gradients:
            continue
        if ema_model is not None:
            ema_model.step(model.parameters())
        done += 1
        if accelerator.is_main_process and done % args.checkpointing_steps == 0:
            accelerator.save_state(args.output_dir / f"checkpoint-{done}")
        if done == args.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(model), ema_model, args.output_dir)
    accelerator.end_training()


def _register(accelerator: Any, ema_model: Any) -> None:
    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            if ema_model is not None:
                ema_model.save_pretrained(str(Path(folder) / "unet_ema"))
            for model in models:
                accelerator.unwrap_model(model).save_pretrained(str(Path(folder) / "unet"))
                weights.pop()

    def load(models: list[Any], folder: str) -> None:
        if ema_model is not None:
            loaded = EMAModel.from_pretrained(str(Path(folder) / "unet_ema"), UNet2DModel)
            ema_model.load_state_dict(loaded.state_dict())
            ema_model.to(accelerator.device)
        while models:
            model = UNet2DModel.from_pretrained(folder, subfolder="unet")
            accelerator.unwrap_model(models.pop()).load_state_dict(model.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _train(accelerator: Any, model: Any, optimizer: Any, number: int) -> None:
    torch.manual_seed(1000 * number + accelerator.process_index)
    with accelerator.accumulate(model):
        loss = model(torch.randn(2, 3, 8, 8), torch.tensor([3, 700])).sample.square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _save(unet: Any, ema_model: Any, folder: Path) -> None:
    unet.save_pretrained(folder / "live")
    if ema_model is not None:
        ema_model.store(unet.parameters())
        ema_model.copy_to(unet.parameters())
        unet.save_pretrained(folder / "ema")
        ema_model.restore(unet.parameters())
    unet.save_pretrained(folder / "restored")


if __name__ == "__main__":
    main()
