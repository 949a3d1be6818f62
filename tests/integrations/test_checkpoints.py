"""`ema average` over the folders that frameworks write: averaged, and loaded again by the framework."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_proto.averages.specs import parse_averages
from ema_server.checkpoints.average import average
from ema_server.checkpoints.folders import find
from ema_server.checkpoints.weights import weigh

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

_STEPS = (500, 1000, 1500)
_SHARES = (0.25, 0.25, 0.5)  # of ema:half_life=500


class _Silent:
    def start(self, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


def _averaged(paths: Sequence[Path], output: Path, *, keep_dtype: bool = False) -> Path:
    checkpoints = find(paths)
    (rule,) = parse_averages("ema:half_life=500")
    average(checkpoints, [weigh(rule, [one.step for one in checkpoints])], output, _Silent(), keep_dtype=keep_dtype)
    return output


def _step(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Change the weights as training would, and return a copy of them."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The average in plain torch, in float64."""
    return {
        name: sum((share * state[name].double() for share, state in zip(_SHARES, states, strict=True)), torch.zeros(()))
        if newest.is_floating_point()
        else newest
        for name, newest in states[-1].items()
    }


def _assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=tolerance, atol=tolerance), name


def _llama(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharded_language_model_with_tied_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model, states = _llama(dtype), []
    for step in _STEPS:
        states.append(_step(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="20KB")

    folder = _averaged([tmp_path], tmp_path / "average")

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    _assert_close(loaded.state_dict(), _mean(states), 1e-6)


def test_dtype_of_the_source_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    model, states = _llama(torch.bfloat16), []
    for step in _STEPS:
        states.append(_step(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")

    folder = _averaged([tmp_path], tmp_path / "average", keep_dtype=True)

    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert loaded.dtype is torch.bfloat16
    _assert_close(loaded.state_dict(), _mean(states), 2.0**-8)


def test_batch_norm_of_a_convolutional_network(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model, states = transformers.ResNetForImageClassification(config), []
    for step in _STEPS:
        model.train()(torch.randn(2, 3, 32, 32))
        states.append(_step(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")

    folder = _averaged([tmp_path], tmp_path / "average")

    loaded = transformers.ResNetForImageClassification.from_pretrained(folder)
    _assert_close(loaded.state_dict(), _mean(states), 1e-6)


def test_adapter_loads_as_an_adapter(tmp_path: Path) -> None:
    base = _llama(torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    states = []
    for step in _STEPS:
        _step(adapted, step)
        states.append({n: t.clone() for n, t in peft.get_peft_model_state_dict(adapted).items()})
        adapted.save_pretrained(tmp_path / f"checkpoint-{step}")

    folder = _averaged([tmp_path], tmp_path / "average")

    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    loaded = peft.PeftModel.from_pretrained(_llama(torch.float32), folder)
    _assert_close(peft.get_peft_model_state_dict(loaded), _mean(states), 1e-6)


def test_component_of_a_diffusion_pipeline(tmp_path: Path) -> None:
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    states = []
    for step in _STEPS:
        states.append(_step(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}" / "unet")

    folder = _averaged(sorted(tmp_path.glob("checkpoint-*/unet")), tmp_path / "average")

    loaded = diffusers.UNet2DModel.from_pretrained(folder)
    _assert_close(loaded.state_dict(), _mean(states), 1e-6)
