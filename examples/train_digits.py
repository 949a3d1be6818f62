"""A training script whose averages a server keeps. Start one (`ema serve --data ema-data`), then run this file.

The digits come from the extra `demo`: `pip install '.[demo]'`. Only the lines marked `# ema` concern the averages.
"""

import torch
from torch.nn.functional import cross_entropy

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

STEPS = 5000
BATCH_IMAGES = 8


def main() -> None:
    """Train and stream the weights."""
    digits, model = load(), DigitNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    ema = EmaClient("tcp://127.0.0.1:5555", run="digits", averages=["raw", "ema:0.99", "ema:0.999"])  # ema
    ema.attach(model, optimizer)  # ema: a snapshot after every step
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(digits.train_labels), (BATCH_IMAGES,))
        optimizer.zero_grad()
        loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    ema.finish()  # ema: publish the last step and mark the run as finished


if __name__ == "__main__":
    main()
