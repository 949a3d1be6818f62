"""A training script that ends while a snapshot is being copied, without closing its client."""

from __future__ import annotations

import threading
import time

from ema_proto.wire.messages import Mode
from support.device_training import Carrying, RecordingWorker, Stamping, client_on
from support.fake_device import FakeDevice
from trainer_client.staging.slots import Slot


class Telling(RecordingWorker):
    """Prints the steps that it was offered."""

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        super()._send(slot, step, mode)
        print("sent", step, flush=True)


def main() -> None:
    """Take one step and exit; the device finishes some time later."""
    device, model = FakeDevice(), Carrying()
    optimizer = Stamping(device, model.parameters())
    client_on(device, Telling()).attach(model, optimizer)
    optimizer.step()

    def later() -> None:
        time.sleep(0.1)
        print("copied", flush=True)
        device.advance(10.0)

    threading.Thread(target=later, daemon=True).start()


if __name__ == "__main__":
    main()
