"""A tiny model that Hugging Face's Trainer trains on the CPU, with its weights recorded after every step.

As a script, `python hf_training.py ENDPOINT RUN FOLDER STEPS [KEY=VALUE ...]`, it trains or resumes in a process, on as
many ranks as the launcher says, and rank 0 writes the recorded weights into FOLDER. The keys: `kill_at=STEP`,
`sharded=true` for FSDP 2, and arguments of TrainingArguments as JSON.
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
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
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
        self.after = after

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **others: Any
    ) -> None:
        self.weights[state.global_step] = {name: _whole(value) for name, value in model.state_dict().items()}
        self.after(state.global_step)

    def save(self, folder: Path) -> None:
        """Write all weights, each step into a file."""
        for step, weights in self.weights.items():
            save_file(weights, folder / f"{step}.safetensors")

    def at(self, step: int) -> dict[str, Tensor]:
        return self.weights[step]


class ShardedTrainer(Trainer):
    """Trains with FSDP 2 on the CPU. Accelerate chooses it by itself on GPUs only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        plugin.set_state_dict_type("SHARDED_STATE_DICT")
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True


def _whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


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


def trainer_of(
    callback: EmaCallback, given: TrainingArguments, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer
) -> Trainer:
    """A Trainer of a new tiny model with the callback."""
    data = samples()
    trainer = kind(tiny_bert(), given, train_dataset=data, eval_dataset=data[:16], callbacks=list(callbacks))
    trainer.add_callback(callback)
    return trainer


def recorded(folder: Path) -> Callable[[int], dict[str, Tensor]]:
    """The weights at a step that a script wrote into `folder`."""
    return lambda step: load_file(folder / f"{step}.safetensors")


def main(endpoint: str, run: str, folder: Path, steps: int, given: dict[str, Any]) -> None:
    """Train to `steps`, from the last checkpoint in `folder` if there is one."""
    kill_at, kind = given.pop("kill_at", None), ShardedTrainer if given.pop("sharded", False) else Trainer
    recorder = Recorder()

    def after(step: int) -> None:
        if step == kill_at:
            recorder.save(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    recorder.after = after
    callback = EmaCallback(endpoint, run or None, AVERAGES, when_behind="wait")
    training = arguments(folder, max_steps=steps, **given)
    checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).exists() else None
    trainer = trainer_of(callback, training, recorder, kind=kind)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        recorder.save(folder)
        print(json.dumps({"run": callback.client.run, "world": training.world_size, "first": min(recorder.weights)}))


if __name__ == "__main__":
    keys = dict(item.split("=", 1) for item in sys.argv[5:])
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), {k: json.loads(v) for k, v in keys.items()})
