"""The function that the demo's evaluation worker calls."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ema_cli.demo.digits import DigitNet, held_out_accuracy, load


def accuracy(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Held-out accuracy of the network with these weights, in [0, 1], and the number of images.

    Raises:
        RuntimeError: the state dict does not fit `DigitNet`; torch says which names differ.
    """
    model = DigitNet()
    model.load_state_dict(state)
    return {"accuracy": held_out_accuracy(model), "samples": len(load().test_labels)}
