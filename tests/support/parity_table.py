"""Which call of which library is which of our rules."""

from __future__ import annotations

from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from support.library_peers import (
    Form,
    Peer,
    averaged_model,
    composer,
    diffusers,
    ema_pytorch,
    lightning,
    timm,
    torchvision,
)

_TIED = ("embedding.weight", "head.weight")
_NARROW = ("narrow",)
_COUNTS = ("norm.num_batches_tracked",)

PEERS = (
    Peer(
        "timm ModelEmaV3(decay=0.9998)",
        "ema:0.9998",
        timm(decay=0.9998),
        0.9998,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(use_warmup=True)",
        "ema:0.9999,warmup=timm",
        timm(use_warmup=True),
        0.9999,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(decay=0.99, use_warmup=True, gamma, power, min, update_after)",
        "ema:0.99,warmup=timm,gamma=7,power=0.75,min=0.4,update_after=20",
        timm(
            decay=0.99,
            use_warmup=True,
            warmup_gamma=7.0,
            warmup_power=0.75,
            min_decay=0.4,
            update_after_step=20,
        ),
        0.99,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(decay=0.9998, foreach=False, exclude_buffers=True)",
        "ema:0.9998,buffers=copy",
        timm(decay=0.9998, foreach=False, exclude_buffers=True),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "torch AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(0.9998))",
        "ema:0.9998,buffers=copy",
        averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.9998)),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "torch AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(0.9998), use_buffers=True)",
        "ema:0.9998",
        averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.9998), use_buffers=True),
        0.9998,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "torch AveragedModel(avg_fn=get_ema_avg_fn(0.9998))",
        "ema:0.9998,buffers=copy",
        averaged_model(avg_fn=get_ema_avg_fn(0.9998)),
        0.9998,
        Form.SCALED,
        differs=_NARROW,
    ),
    Peer(
        "diffusers EMAModel(use_ema_warmup=True)",
        "ema:0.9999,warmup=timm",
        diffusers(use_ema_warmup=True),
        0.9999,
        differs=_NARROW,
    ),
    Peer(
        "diffusers EMAModel(use_ema_warmup=True, decay, inv_gamma, power, min_decay, update_after_step)",
        "ema:0.99,warmup=timm,gamma=7,power=0.75,min=0.4,update_after=20",
        diffusers(
            use_ema_warmup=True,
            decay=0.99,
            inv_gamma=7.0,
            power=0.75,
            min_decay=0.4,
            update_after_step=20,
            foreach=True,
        ),
        0.99,
        differs=_NARROW,
    ),
    Peer(
        "ema-pytorch EMA(update_every=1)",
        "ema:0.9999,warmup=timm,update_after=100",
        ema_pytorch(update_every=1),
        0.9999,
        differs=_NARROW + _COUNTS,
        float32_decay=True,
    ),
    Peer(
        "ema-pytorch EMA(beta=0.99, update_every=1, update_after_step=20, inv_gamma, power, min_value)",
        "ema:0.99,warmup=timm,gamma=7,power=0.75,min=0.4,update_after=20",
        ema_pytorch(
            beta=0.99, update_every=1, update_after_step=20, inv_gamma=7.0, power=0.75, min_value=0.4, use_foreach=True
        ),
        0.99,
        differs=_NARROW + _COUNTS,
        float32_decay=True,
    ),
    Peer(
        "Lightning EMAWeightAveraging()",
        "ema:0.999",
        lightning("EMAWeightAveraging"),
        0.999,
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "composer EMA(half_life='1000ba')",
        f"ema:{2 ** (-1 / 1000)!r}",
        composer(1000),
        2 ** (-1 / 1000),
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "torchvision's reference",
        "ema:0.9998",
        torchvision(0.9998),
        0.9998,
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
)
