"""Training with Accelerate: gradient accumulation, one or several processes, and a checkpoint to resume from.

Start a server (`ema serve --data ema-data`), then this file with `python`, `accelerate launch` or
`torchrun --nproc-per-node 2`. It may be killed at any time; started again, it continues from its last checkpoint. It
needs two extras: `pip install '.[accelerate,demo]'`. Only the lines marked `# ema` concern the averages.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ema_cli.demo.digits import DigitNet, load
from trainer_client import EmaClient  # ema

STEPS = 2000
SAVE_EVERY = 500
BATCH_IMAGES = 8  # of each process, four times for a step
CHECKPOINT = Path("accelerate-digits")


def main() -> None:
    """Train in every process, from the checkpoint if there is one, and stream the weights from one."""
    accelerator = Accelerator(gradient_accumulation_steps=4)
    torch.manual_seed(0)
    digits, model = load(), DigitNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), BATCH_IMAGES, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    ema = EmaClient("tcp://127.0.0.1:5555", run="accelerate-digits", averages=["raw", "ema:0.99"])  # ema
    accelerator.register_for_checkpointing(ema)  # ema: save_state() saves the run's name and step
    accelerator.register_save_state_pre_hook(lambda *_: ema.checkpoint(ema.steps))  # ema: the averages of that step
    if CHECKPOINT.exists():
        accelerator.load_state(CHECKPOINT)
        accelerator.print(f"continuing after step {ema.steps}")
    ema.attach(model, optimizer)  # ema: after load_state()

    step = ema.steps
    while step < STEPS:
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % SAVE_EVERY == 0:
                    accelerator.save_state(CHECKPOINT)
                    accelerator.print(f"saved step {step}: loss {loss.item():.3f}")
                if step == STEPS:
                    break
    ema.finish()  # ema: publish the last step and mark the run as finished
    print(f"process {accelerator.process_index}: {step} steps, {ema.steps} of them counted")
    accelerator.wait_for_everyone()  # a process that ends while another still uses the group can abort it
    accelerator.end_training()


if __name__ == "__main__":
    main()
