"""A diffusion model of handwritten digits, trained with diffusers; its average is kept by a server.

Start one (`ema serve --data ema-data`), set EMA_ENDPOINT, EMA_URL and EMA_RUN, then run this file. The digits come from
the extra `demo`: `pip install '.[diffusers,demo]'`. With diffusers' own class only the import differs:
`from diffusers.training_utils import EMAModel`, and there is no `finish()`.
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn.functional import mse_loss

from ema_cli.demo.digits import load
from trainer_client.diffusers import RemoteEMAModel as EMAModel  # ema

STEPS = 300
BATCH_IMAGES = 16
VALIDATE_STEPS = 100


def main() -> None:
    """Train; validate and save the average."""
    torch.manual_seed(0)
    digits, scheduler = load(), DDPMScheduler(num_train_timesteps=100)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    ema = EMAModel(
        unet.parameters(), decay=0.98, use_ema_warmup=True, power=0.75, model_cls=UNet2DModel, model_config=unet.config
    )

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        noise, times = torch.randn_like(images), torch.randint(100, (len(images),))
        return mse_loss(unet(scheduler.add_noise(images, noise, times), times).sample, noise)

    @torch.no_grad()
    def validation_loss() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return loss_of(digits.test_images).item()

    for step in range(1, STEPS + 1):
        batch = torch.randint(len(digits.train_images), (BATCH_IMAGES,))
        optimizer.zero_grad()
        loss_of(digits.train_images[batch]).backward()
        optimizer.step()
        ema.step(unet.parameters())
        if step % VALIDATE_STEPS == 0:
            last = validation_loss()
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            print(f"step {step}: validation loss {last:.4f}, of the average {validation_loss():.4f}", flush=True)
            ema.restore(unet.parameters())
    ema.save_pretrained("digits-unet-ema")
    ema.finish()  # ema: publish the last step and mark the run as finished


if __name__ == "__main__":
    main()
