"""`EmaCallback` in the trainers of TRL: what is averaged is the policy that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ema_reader import Reader
from support.hf_training import AVERAGES, DECAY, Recorder
from support.oracle import largest_difference, replay
from support.processes import ServerProcess
from trainer_client.transformers import EmaCallback

_STEPS = 4
_LEDGER = {"ranges": [[1, _STEPS, 1]], "set": [], "origin": 0}
_WORDS = ("[PAD]", "[EOS]", "[UNK]", "a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server")) as process:
        yield process


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(_WORDS)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def _policy(folder: Path) -> LlamaForCausalLM:
    """A model that was loaded from a folder: reference models are loaded from there again."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    return LlamaForCausalLM.from_pretrained(folder / "policy")


def _quiet(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": _STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def _sft(folder: Path) -> Trainer:
    data = Dataset.from_dict({"text": ["a b c d e"] * 16})
    return SFTTrainer(_policy(folder), SFTConfig(**_quiet(folder)), train_dataset=data, processing_class=_tokenizer())


def _dpo(folder: Path) -> Trainer:
    data = Dataset.from_dict({"prompt": ["a b"] * 16, "chosen": [" c d"] * 16, "rejected": [" e e"] * 16})
    return DPOTrainer(
        _policy(folder), args=DPOConfig(**_quiet(folder)), train_dataset=data, processing_class=_tokenizer()
    )


def _grpo(folder: Path) -> Trainer:
    def longest(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    config = GRPOConfig(num_generations=2, max_completion_length=6, beta=0.1, **_quiet(folder))
    data = Dataset.from_dict({"prompt": ["a b c", "d e"] * 8})
    return GRPOTrainer(_policy(folder), longest, args=config, train_dataset=data, processing_class=_tokenizer())


@pytest.mark.parametrize("make", [_sft, _dpo, _grpo], ids=["SFT", "DPO", "GRPO"])
def test_the_policy_is_averaged(server: ServerProcess, tmp_path: Path, make: Callable[[Path], Trainer]) -> None:
    recorder, run = Recorder(), make.__name__.strip("_")
    trainer = make(tmp_path)
    trainer.add_callback(recorder)
    trainer.add_callback(EmaCallback(server.zmq, run, AVERAGES, when_behind="wait", trainer=trainer))
    trainer.train()

    with Reader(server.http) as reader:
        assert reader.run(run).gap_steps == 0
        raw, average = reader.load(f"{run}/raw"), reader.load(f"{run}/ema")
        folder = reader.download(f"{run}/ema", tmp_path / "average")
    loaded, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert largest_difference(recorder.at(1), recorder.at(_STEPS)) > 0.0
    assert largest_difference(raw, trainer.model.state_dict()) == 0.0
    assert largest_difference(average, replay(_LEDGER, DECAY, recorder.at)) < 1e-6
    assert largest_difference(loaded.state_dict(), average) == 0.0
    assert tokenizer("b c")["input_ids"] == trainer.processing_class("b c")["input_ids"]


def test_the_reference_model_follows_the_average(server: ServerProcess, tmp_path: Path) -> None:
    trainer = _dpo(tmp_path)
    callback = EmaCallback(server.zmq, "followed", AVERAGES, when_behind="wait")
    pull = callback.client.pull(trainer.ref_model, "ema", every=2, url=server.http)
    trainer.add_callback(callback)
    trainer.add_callback(Recorder(lambda step: step % 2 == 0 and pull.wait(30.0)))
    before = {name: value.clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()

    assert pull.step is not None
    with Reader(server.http) as reader:
        average = reader.load(f"followed/ema@step-{pull.step}")
    assert largest_difference(trainer.ref_model.state_dict(), average) == 0.0
    assert largest_difference(before, average) > 0.0


def test_an_adapter_is_averaged_and_loaded_by_peft(server: ServerProcess, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = Dataset.from_dict({"text": ["a b c d e"] * 16})
    config = SFTConfig(**_quiet(tmp_path / "trainer"))
    trainer = SFTTrainer(
        _policy(tmp_path), config, train_dataset=data, processing_class=_tokenizer(), peft_config=adapter
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(EmaCallback(server.zmq, "lora", AVERAGES, when_behind="wait"))
    trainer.train()

    def weights(step: int) -> dict[str, Tensor]:
        trained = {name: value for name, value in recorder.at(step).items() if "lora_" in name}
        return {name.replace(".default.", "."): value for name, value in trained.items()}

    with Reader(server.http) as reader:
        raw, average = reader.load("lora/raw"), reader.load("lora/ema")
        folder = reader.download("lora/ema", tmp_path / "average")
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "policy"), folder)
    assert len(raw) == 4
    assert largest_difference(raw, weights(_STEPS)) == 0.0
    assert largest_difference(average, replay(_LEDGER, DECAY, weights)) < 1e-6
    assert largest_difference(peft.get_peft_model_state_dict(loaded), average) == 0.0
