"""Real data without a download: scikit-learn's 1,797 handwritten digits, and a small convolutional network for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
_TRAIN_IMAGES = 900  # half: enough held-out images that 1 % is 9 of them
_BRIGHTEST = 16.0  # the scale of the data


@dataclass(frozen=True, slots=True)
class Digits:
    """Images `[n, 1, 8, 8]`, float32 in [0, 1]; labels `[n]`, int64. The two halves share no image."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def load() -> Digits:
    """Read the digits and split them; the same split in every process."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / _BRIGHTEST
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    train, test = slice(None, _TRAIN_IMAGES), slice(_TRAIN_IMAGES, None)
    return Digits(images[train], labels[train], images[test], labels[test])


class DigitNet(nn.Module):
    """Three 3 x 3 convolutions with batch norm, global average pooling, a linear layer: `[n, 1, 8, 8]` to `[n, 10]`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width, stride=1),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def _block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def held_out_accuracy(model: nn.Module) -> float:
    """Share of the held-out images that `model` classifies correctly, in evaluation mode; the mode is restored."""
    digits, training = load(), model.training
    model.eval()
    with torch.no_grad():
        right = model(digits.test_images).argmax(dim=1) == digits.test_labels
    model.train(training)
    return float(right.double().mean())
