from __future__ import annotations

import torch

from ema_cli.demo.digits import CLASSES, DigitNet, held_out_accuracy, load
from ema_cli.demo.evaluate import accuracy


def test_halves_share_no_image() -> None:
    digits = load()

    train = {image.numpy().tobytes() for image in digits.train_images}
    test = {image.numpy().tobytes() for image in digits.test_images}
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert train & test == set()
    assert digits.train_images.max() == 1.0


def test_each_half_has_every_digit() -> None:
    digits = load()

    assert set(digits.train_labels.tolist()) == set(digits.test_labels.tolist()) == set(range(CLASSES))


def test_accuracy_is_that_of_the_given_weights() -> None:
    model = DigitNet()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(3), CLASSES).float())

    labels = load().test_labels
    share = (labels == 3).double().mean().item()
    assert accuracy(model.state_dict()) == {"accuracy": share, "samples": len(labels)}


def test_evaluation_keeps_the_models_mode() -> None:
    model = DigitNet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    held_out_accuracy(model)

    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
