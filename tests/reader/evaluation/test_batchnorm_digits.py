"""Accuracy with recomputed, averaged and copied statistics: a real network on real data, averaged in the test.

The demo is imported by the tests alone: scikit-learn, which it needs, takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ema_reader.evaluation.batchnorm import recomputed

STEPS = 200
DECAY = 0.99
CLEARLY = 0.1  # over 5 seeds the smallest difference was 0.22


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The network is small: a second thread makes it slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last weights of a short training at a high rate, and their average, statistics included."""
    from ema_cli.demo.digits import DigitNet, load

    torch.manual_seed(seed)
    digits, model = load(), DigitNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9)
    average: dict[str, Tensor] = {}
    for _ in range(STEPS):
        batch = torch.randint(len(digits.train_labels), (8,))
        optimizer.zero_grad()
        cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
        optimizer.step()
        for name, tensor in model.state_dict().items():
            if name in average and tensor.is_floating_point():
                average[name].lerp_(tensor, 1 - DECAY)
            else:
                average[name] = tensor.clone()
    return model.state_dict(), average


def training_batches() -> tuple[nn.Module, list[Tensor]]:
    from ema_cli.demo.digits import DigitNet, load

    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    return DigitNet(), [load().train_images[part] for part in order.split(90)]


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_is_best_with_recomputed_and_worst_with_copied_statistics(seed: int) -> None:
    from ema_cli.demo.evaluate import accuracy

    last, average = train(seed)
    copied = {name: last[name] if "running" in name else tensor for name, tensor in average.items()}
    recalibrated = {**average, **recomputed(average, "training_batches", training_batches)}

    scores = [accuracy(state)["accuracy"] for state in (copied, average, recalibrated)]
    assert scores[0] + CLEARLY < scores[1]
    assert scores[1] + CLEARLY < scores[2]
    assert all(
        torch.equal(recalibrated[name], average[name])
        for name in average
        if "running" not in name and "num" not in name
    )
