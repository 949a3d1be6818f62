"""`python -m trainer_client.diffusers SCRIPT --use_ema ...`: the arguments of the script are passed on."""

from __future__ import annotations

import sys

from trainer_client import script
from trainer_client.diffusers.run import run_script

_USAGE = """usage: python -m trainer_client.diffusers SCRIPT [ARGUMENT ...]

Runs a training script that uses diffusers' EMAModel, unmodified, with the average kept by an ema server.

  SCRIPT     a training script of diffusers, or lerobot-train
  ARGUMENT   passed on, for example: --use_ema --resolution 64 --output_dir out

EMA_ENDPOINT is the server's address for trainers, EMA_URL the one for readers, EMA_RUN the name of the run."""

if __name__ == "__main__":
    sys.exit(script.main(sys.argv[1:], _USAGE, run_script))
