"""A tiny model that Hugging Face's Trainer trains on the CPU, with its weights recorded after every step.

As a script, `python hf_training.py ENDPOINT RUN FOLDER STEPS [KEY=VALUE ...]`, it trains or resumes in a process, on as
many ranks as the launcher says, and rank 0 writes the recorded weights into FOLDER. The keys: `kill_at=STEP`, and
arguments of TrainingArguments as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from trainer_client.transformers import EmaCallback

DECAY = 0.9
AVERAGES = ("raw", f"ema:{DECAY},name=ema")


class Recorder(TrainerCallback):
    """Keeps a copy of the weights after each step, by step; `after` is called then."""

    def __init__(self, after: Callable[[int], object] = lambda step: None) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self._after = after

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **others: Any
    ) -> None:
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        self._after(state.global_step)

    def at(self, step: int) -> dict[str, Tensor]:
        return self.weights[step]


def tiny_bert() -> BertForSequenceClassification:
    """A classifier with two labels, always the same."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def samples(count: int = 64) -> list[dict[str, Any]]:
    """Sequences, labelled by whether their first token is in the upper half of the vocabulary."""
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": int(each[0] >= 16)} for each in tokens]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    """TrainingArguments for the CPU, without anything that is printed or sent."""
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 5}
    fast = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return TrainingArguments(str(folder / "trainer"), **(quiet | fast | given))


def trainer_of(callback: EmaCallback, given: TrainingArguments, *callbacks: TrainerCallback) -> Trainer:
    """A Trainer of a new tiny model with the callback."""
    data = samples()
    trainer = Trainer(tiny_bert(), given, train_dataset=data, eval_dataset=data[:16], callbacks=list(callbacks))
    trainer.add_callback(callback)
    return trainer


def recorded(folder: Path) -> Callable[[int], dict[str, Tensor]]:
    """The weights at a step that a script wrote into `folder`."""
    return lambda step: load_file(folder / f"{step}.safetensors")


def main(endpoint: str, run: str, folder: Path, steps: int, given: dict[str, Any]) -> None:
    """Train to `steps`, from the last checkpoint in `folder` if there is one."""
    kill_at = given.pop("kill_at", None)
    recorder = Recorder(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == kill_at else None)
    callback = EmaCallback(endpoint, run or None, AVERAGES, when_behind="wait")
    training = arguments(folder, max_steps=steps, **given)
    checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).exists() else None
    trainer = trainer_of(callback, training, recorder)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        for step, weights in recorder.weights.items():
            save_file(weights, folder / f"{step}.safetensors")
        print(json.dumps({"run": callback.client.run, "world": training.world_size, "first": min(recorder.weights)}))


if __name__ == "__main__":
    keys = dict(item.split("=", 1) for item in sys.argv[5:])
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), {k: json.loads(v) for k, v in keys.items()})
