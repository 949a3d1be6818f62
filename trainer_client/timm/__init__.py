"""timm's averaged model, kept by the server instead of the trainer.

- `remote`: `RemoteModelEma`, with the interface of timm's `ModelEmaV3`
- `known`: finds timm's averaging class, and checks that it can be replaced
- `run`: runs timm's training script with that class replaced
"""
