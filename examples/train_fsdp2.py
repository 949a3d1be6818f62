"""Training with FSDP2 (`fully_shard`): `torchrun --nproc-per-node 2 train_fsdp2.py`.

Every rank runs the same lines and streams its own shards; nothing is gathered. Start a server first
(`ema serve --data ema-data`). The digits come from the extra `demo`: `pip install '.[demo]'`.
"""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

STEPS = 2000
BATCH_IMAGES = 8  # of each rank


def main() -> None:
    """Train a model that is sharded over all ranks."""
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)  # the same weights on all ranks
    digits, model = load(), DigitNet()
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))  # "cuda" on GPUs
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    ema = EmaClient("tcp://127.0.0.1:5555", run="fsdp-digits", averages=["raw", "ema:0.99"])  # ema: on every rank
    ema.attach(model, optimizer)  # ema: on every rank, after fully_shard
    torch.manual_seed(distributed.get_rank())  # other batches on each rank
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(digits.train_labels), (BATCH_IMAGES,))
        optimizer.zero_grad()
        loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        if step % 500 == 0 and distributed.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    ema.finish()  # ema: on every rank
    print(f"rank {distributed.get_rank()}: {ema.steps} steps, the client is {ema.stats()['client']}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
