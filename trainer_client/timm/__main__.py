"""`python -m trainer_client.timm train.py DATA --model-ema ...`: the arguments of timm's script are passed on."""

from __future__ import annotations

import sys

from trainer_client import script
from trainer_client.timm.run import run_script

_USAGE = """usage: python -m trainer_client.timm SCRIPT [ARGUMENT ...]

Runs timm's training script, unmodified, with the averaged model of --model-ema kept by an ema server.

  SCRIPT     timm's train.py
  ARGUMENT   passed on, for example: imagenette2-320 --model resnet34 --model-ema --model-ema-decay 0.99

EMA_ENDPOINT is the server's address for trainers, EMA_URL the one for readers, EMA_RUN the name of the run."""

if __name__ == "__main__":
    sys.exit(script.main(sys.argv[1:], _USAGE, run_script))
