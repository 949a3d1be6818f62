"""Run by torchrun: a training with Accelerate's FSDP2 on the CPU, of which every rank streams its shards.

    accelerate_sharded.py ENDPOINT RUN FOLDER STEPS

Rank 0 saves the whole weights after each step as FOLDER/step-N.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from trainer_client import EmaClient


def _accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    # Accelerate does this itself on GPUs; what `prepare` does then works on the CPU too.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    return accelerator


def main() -> None:
    endpoint, run, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    accelerator = _accelerator()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    ema = EmaClient(endpoint, run, ["raw", "ema:0.9"], when_behind="wait")
    ema.attach(model, optimizer)
    while ema.steps < steps:
        torch.manual_seed(10 * ema.steps + accelerator.process_index)
        accelerator.backward(model(torch.randn(4, 5)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        if accelerator.is_main_process:
            torch.save(weights, folder / f"step-{ema.steps}.pt")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert ema.finish()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
