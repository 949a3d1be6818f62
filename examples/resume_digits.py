"""A training script that can be killed at any time. Started again, weights and averages continue from the same step.

Start a server (`ema serve --data ema-data`), then this file, repeatedly. The digits come from the extra `demo`:
`pip install '.[demo]'`. Only the lines marked `# ema` concern the averages.
"""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

STEPS = 5000
SAVE_EVERY = 500
BATCH_IMAGES = 8
CHECKPOINT = Path("digits.pt")


def main() -> None:
    """Train, from the checkpoint if there is one."""
    digits, model, done = load(), DigitNet(), 0
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    ema = EmaClient("tcp://127.0.0.1:5555", run="resumed-digits", averages=["raw", "ema:0.99"])  # ema
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])  # ema: the averages return to the step of this checkpoint
        done = saved["step"]
        print(f"continuing after step {done}")
    ema.attach(model, optimizer)  # ema: a snapshot after every step
    for step in range(done + 1, STEPS + 1):
        batch = torch.randint(len(digits.train_labels), (BATCH_IMAGES,))
        optimizer.zero_grad()
        loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        if step % SAVE_EVERY == 0:
            ema.checkpoint(step)  # ema: the server keeps the averages of this step
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state["ema"] = ema.state_dict()  # ema
            torch.save(state, CHECKPOINT.with_suffix(".new"))
            CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
            print(f"saved step {step}: loss {loss.item():.3f}")
    ema.finish()  # ema: publish the last step and mark the run as finished


if __name__ == "__main__":
    main()
