"""A small diffusion model of diffusers, with seeded weights."""

from __future__ import annotations

from typing import Any

import torch


def small_unet(seed: int = 0) -> Any:
    """A UNet2DModel of 45,259 parameters in 144 tensors, for images of 8 x 8 pixels."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
