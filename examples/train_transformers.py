"""Hugging Face's Trainer with averages that are evaluated while it trains: a small language model of Python's grammar.

In this folder, after `pip install '.[transformers,server]'`:

    ema serve --data ema-data --evaluate train_transformers:held_out_loss
    python train_transformers.py

Nothing is downloaded: the text is the source code of a module of the standard library.
"""

import inspect
import typing

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trainer_client.transformers import EmaCallback  # ema

CHARS = 32
HELD_OUT = 0.1
STEPS = 600


def model() -> LlamaForCausalLM:
    """Return a language model of ASCII characters with 0.1 M parameters."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CHARS,
    )
    return LlamaForCausalLM(config)


def samples() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Return samples to train with, and others to evaluate with."""
    text = inspect.getsource(typing).encode("ascii", "replace")
    tokens = torch.tensor(list(text[: len(text) - len(text) % CHARS])).view(-1, CHARS)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    found = [{"input_ids": each, "labels": each} for each in tokens[order]]
    held_out = int(len(found) * HELD_OUT)
    return found[held_out:], found[:held_out]


def held_out_loss(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the metrics of one version; the server calls this.

    Args:
        state: its weights, by name.
    """
    averaged = model()
    averaged.load_state_dict(state)
    averaged.eval()
    tokens = torch.stack([each["input_ids"] for each in samples()[1]])
    with torch.no_grad():
        return {"loss": float(averaged(input_ids=tokens, labels=tokens).loss)}


def main() -> None:
    """Train, and stream the weights."""
    arguments = TrainingArguments(
        "char-model",
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="constant",  # averages gain most where the rate does not decay
        eval_strategy="steps",
        eval_steps=100,
        save_steps=100,
        logging_steps=50,
        report_to="none",
    )
    train, held_out = samples()
    trainer = Trainer(model(), arguments, train_dataset=train, eval_dataset=held_out)
    averages = ["raw", "ema:0.98", "ema:0.99"]
    ema = EmaCallback(  # ema
        "tcp://127.0.0.1:5555", "char-model", averages, url="http://127.0.0.1:8080", scores_timeout_s=60.0
    )
    trainer.add_callback(ema)  # ema: a snapshot after every step, and the scores of all averages in the log
    trainer.train()
    for entry in trainer.state.log_history:
        if "eval_averages_step" in entry:
            print(entry)


if __name__ == "__main__":
    main()
