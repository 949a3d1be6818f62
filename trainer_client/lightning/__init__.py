"""`EmaCallback`: averages of a LightningModule, kept by the server.

For the packages `lightning` and `pytorch_lightning`, 2.6 and later.

- `callback`: `EmaCallback`, and the hooks of the Trainer that it uses
- `base`: the class `Callback` of the installed package
- `settings`: the constructor's arguments that are not those of `EmaClient`
- `validation`: validates averages on the batches of the Trainer's own validation
- `server`: scores and averages, read from the server over HTTP
"""

from __future__ import annotations

from trainer_client.lightning.callback import EmaCallback

__all__ = ["EmaCallback"]
