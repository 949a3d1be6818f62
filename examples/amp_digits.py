"""Mixed precision and gradient accumulation: what counts is a step of the optimizer, not a batch or a scaler's call.

Start a server (`ema serve --data ema-data`), then this file. The digits come from the extra `demo`:
`pip install '.[demo]'`. Only the lines marked `# ema` concern the averages.
"""

import torch
from torch.nn.functional import cross_entropy

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

BATCHES = 8000
BATCHES_PER_STEP = 4
BATCH_IMAGES = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16
SCALE = 2.0**16  # too large a scale overflows: the scaler then leaves the optimizer's step out, and halves it


def main() -> None:
    """Train and stream the weights."""
    digits, model = load(), DigitNet().to(DEVICE)
    images, labels = digits.train_images.to(DEVICE), digits.train_labels.to(DEVICE)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    ema = EmaClient("tcp://127.0.0.1:5555", run="amp-digits", averages=["raw", "ema:0.99"])  # ema
    ema.attach(model, optimizer)  # ema: the optimizer, not the scaler
    for count in range(1, BATCHES + 1):
        batch = torch.randint(len(labels), (BATCH_IMAGES,), device=DEVICE)
        with torch.autocast(DEVICE, DTYPE):
            loss = cross_entropy(model(images[batch]), labels[batch])
        scaler.scale(loss / BATCHES_PER_STEP).backward()
        if count % BATCHES_PER_STEP == 0:
            scaler.step(optimizer)  # a snapshot follows, unless the scaler leaves the step out
            scaler.update()
            optimizer.zero_grad()
        if count % 2000 == 0:
            print(f"batch {count}, step {ema.steps}: loss {loss.item():.3f}")
    ema.finish()  # ema: publish the last step and mark the run as finished
    print(f"{BATCHES} batches, {ema.steps} steps")


if __name__ == "__main__":
    main()
