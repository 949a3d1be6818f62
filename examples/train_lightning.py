"""A LightningModule whose averages a server keeps. Start one (`ema serve --data ema-data`), then run this file.

Needs the extras `lightning` and `demo`, which has the digits: `pip install '.[lightning,demo]'`. Only the lines marked
`# ema` concern the averages.
"""

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ema_cli.demo.digits import DigitNet, load
from trainer_client.lightning import EmaCallback  # ema

EPOCHS = 10
BATCH_IMAGES = 16


class Digits(L.LightningModule):
    """Classifies images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DigitNet()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy. The callback runs this for the average too, and logs `ema/val_acc`."""
        images, labels = batch
        self.log("val_acc", (self.net(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """RMSprop, as in the first papers with averaged weights."""
        return torch.optim.RMSprop(self.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    """Train, and print how the last weights compare with their average."""
    digits = load()
    train = DataLoader(TensorDataset(digits.train_images, digits.train_labels), BATCH_IMAGES, shuffle=True)
    held_out = DataLoader(TensorDataset(digits.test_images, digits.test_labels), 128)
    ema = EmaCallback("tcp://127.0.0.1:5555", run="lightning-digits", decay=0.99, module="net", validate="ema")  # ema
    trainer = L.Trainer(  # which writes neither logs nor checkpoints
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[ema],  # ema
    )
    trainer.fit(Digits(), train, held_out)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
