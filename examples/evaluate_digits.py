"""An evaluation function. Run in this folder: `ema evaluate evaluate_digits:accuracy --run digits`.

The digits come from the extra `demo`: `pip install '.[demo]'`.
"""

import torch

from ema_cli.demo.digits import DigitNet, load


def accuracy(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the metrics of one version.

    Args:
        state: its weights, by name.
    """
    digits, model = load(), DigitNet()
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        right = model(digits.test_images).argmax(dim=1) == digits.test_labels
    return {"accuracy": float(right.double().mean()), "samples": len(right)}


def training_batches() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Return a model and the batches for its statistics: `--recalibrate-bn evaluate_digits:training_batches`."""
    images = load().train_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return DigitNet(), [images[part] for part in order.split(90)]
