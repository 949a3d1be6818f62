"""Training with `DistributedDataParallel`: `torchrun --nproc-per-node 2 ddp_digits.py`.

Every rank runs the same lines. Rank 0 streams; on the others the client counts steps, and its methods do nothing.
Start a server first (`ema serve --data ema-data`). The digits come from the extra `demo`: `pip install '.[demo]'`.
"""

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

STEPS = 2000
BATCH_IMAGES = 8  # of each rank


def main() -> None:
    """Train on all ranks, and stream the weights from one."""
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(distributed.get_rank())  # other batches on each rank; the weights are those of rank 0
    digits, model = load(), DistributedDataParallel(DigitNet())
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    ema = EmaClient("tcp://127.0.0.1:5555", run="ddp-digits", averages=["raw", "ema:0.99"])  # ema: on every rank
    ema.attach(model, optimizer)  # ema: the names are those of the module inside
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(digits.train_labels), (BATCH_IMAGES,))
        optimizer.zero_grad()
        loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        if step % 500 == 0 and distributed.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    ema.finish()  # ema
    print(f"rank {distributed.get_rank()}: {ema.steps} steps, the client is {ema.stats()['client']}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
