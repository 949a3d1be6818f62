"""Models to train: vision transformers on random tokens in place of image patches.

The shapes are those of ViT-S/16 (22 million parameters) and ViT-B/16 (87 million), tensor by tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEAD_WIDTH = 64
_PATCH_VALUES = 3 * 16 * 16
_TOKENS_MAX = 197
_CLASSES = 1000

WIDTHS = {"22 M": 384, "87 M": 768}
QUICK_WIDTHS = {"0.4 M": 64}


class Block(nn.Module):
    """Attention and a perceptron, each around a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens: [batch, tokens, width]."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, width // _HEAD_WIDTH, _HEAD_WIDTH)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x


class Transformer(nn.Module):
    """An embedding, transformer blocks, and a classifier. `width` is a multiple of 64."""

    def __init__(self, width: int, depth: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(_PATCH_VALUES, width)
        self.position = nn.Parameter(torch.zeros(1, _TOKENS_MAX, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        """Classes of [batch, tokens, 768]."""
        x = self.embed(patches) + self.position[:, : patches.shape[1]]
        classes: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return classes


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def trained(
    width: int, batch: int, tokens: int, device: str = "cpu"
) -> tuple[Transformer, torch.optim.Optimizer, Tensor]:
    """A model on `width`, its AdamW, and a batch to train it on."""
    torch.manual_seed(0)
    model = Transformer(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, optimizer, torch.randn(batch, tokens, _PATCH_VALUES).to(device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, patches: Tensor) -> None:
    """One step towards the first class."""
    loss = functional.cross_entropy(model(patches), torch.zeros(len(patches), dtype=torch.long, device=patches.device))
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
