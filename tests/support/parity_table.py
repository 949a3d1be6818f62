"""Calls of other libraries and our corresponding rules."""

from __future__ import annotations

import math

from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from support.formula_peers import cosine, decays, half_life_ramp, mean_of, merged, power_function, zero_debiased
from support.library_peers import (
    Begin,
    Form,
    Peer,
    averaged_model,
    composer,
    diffusers,
    ema_pytorch,
    lightning,
    timm,
    timm_v2,
    torch_ema,
    torchvision,
)
from support.parity_model import STEPS

_TIED = ("embedding.weight", "head.weight")
_NARROW = ("narrow",)
_COUNTS = ("norm.num_batches_tracked",)
_CROWSON = "warmup=timm,gamma=7,power=0.75,min=0.4,update_after=20"

_TIMM = (
    Peer(
        "timm ModelEmaV3(decay=0.9998)",
        "ema:0.9998,preset=timm-v3",
        timm(decay=0.9998),
        0.9998,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(use_warmup=True)",
        "ema:warmup=timm,preset=timm-v3",
        timm(use_warmup=True),
        0.9999,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(decay=0.99, use_warmup=True, warmup_gamma, warmup_power, min_decay, update_after_step)",
        f"ema:0.99,{_CROWSON},preset=timm-v3",
        timm(decay=0.99, use_warmup=True, warmup_gamma=7.0, warmup_power=0.75, min_decay=0.4, update_after_step=20),
        0.99,
        differs=_TIED + _NARROW,
    ),
    Peer(
        "timm ModelEmaV3(decay=0.9998, foreach=False, exclude_buffers=True)",
        "ema:0.9998,preset=timm-v3,buffers=copy",
        timm(decay=0.9998, foreach=False, exclude_buffers=True),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "timm ModelEmaV2(decay=0.9998)",
        "ema:0.9998,preset=timm-v2",
        timm_v2(decay=0.9998),
        0.9998,
        Form.SCALED,
        differs=_TIED + _NARROW + _COUNTS,
    ),
)

_TORCH = (
    Peer(
        "torch AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(0.9998))",
        "ema:0.9998,preset=torch-ema",
        averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.9998)),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "torch AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(0.9998), use_buffers=True)",
        "ema:0.9998,preset=torch-ema,buffers=average",
        averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.9998), use_buffers=True),
        0.9998,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "torch AveragedModel(avg_fn=get_ema_avg_fn(0.9998))",
        "ema:0.9998,preset=torch-ema",
        averaged_model(avg_fn=get_ema_avg_fn(0.9998)),
        0.9998,
        Form.SCALED,
        differs=_NARROW,
    ),
    Peer(
        "torch AveragedModel()",
        "swa:preset=torch-swa",
        averaged_model(),
        0.0,
        differs=_NARROW,
    ),
    Peer(
        "torch AveragedModel(use_buffers=True)",
        "swa",
        averaged_model(use_buffers=True),
        0.0,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "torch AveragedModel() after step 200, every 25 steps",
        "swa:start=200,every=25,preset=torch-swa",
        averaged_model(on=lambda step: step >= 200 and step % 25 == 0),
        0.0,
        differs=_NARROW,
    ),
    Peer(
        "Lightning WeightAveraging()",
        "swa",
        lightning("WeightAveraging"),
        0.0,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "Lightning EMAWeightAveraging()",
        "ema:preset=lightning",
        lightning("EMAWeightAveraging"),
        0.999,
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
    Peer(
        "torchvision's reference, decay 0.9998 after adjustment",
        "ema:0.9998,preset=torchvision",
        torchvision(0.9998),
        0.9998,
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
)

_OTHERS = (
    Peer(
        "diffusers EMAModel()",
        "ema:preset=diffusers",
        diffusers(),
        0.9999,
        differs=_NARROW,
    ),
    Peer(
        "diffusers EMAModel(use_ema_warmup=True)",
        "ema:0.9999,warmup=timm,buffers=copy",
        diffusers(use_ema_warmup=True),
        0.9999,
        differs=_NARROW,
    ),
    Peer(
        "diffusers EMAModel(use_ema_warmup=True, decay, inv_gamma, power, min_decay, update_after_step)",
        f"ema:0.99,{_CROWSON}",
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
        "LeRobot's EMAConfig(), which is diffusers EMAModel",
        "ema:preset=lerobot",
        diffusers(use_ema_warmup=True, decay=0.9999, min_decay=0.0, update_after_step=0, inv_gamma=1.0, power=0.75),
        0.9999,
        differs=_NARROW,
    ),
    Peer(
        "LeRobot's EMAConfig(decay=0.99), which is diffusers EMAModel",
        "ema:0.99,buffers=copy",
        diffusers(use_ema_warmup=True, decay=0.99, min_decay=0.99, update_after_step=0, inv_gamma=1.0, power=0.75),
        0.99,
        differs=_NARROW,
    ),
    Peer(
        "ema-pytorch EMA(update_every=1)",
        "ema:preset=ema-pytorch",
        ema_pytorch(update_every=1),
        0.9999,
        differs=_NARROW + _COUNTS,
        float32_decay=True,
    ),
    Peer(
        "ema-pytorch EMA(beta=0.99, update_every=1, update_after_step=20, inv_gamma, power, min_value)",
        f"ema:0.99,{_CROWSON}",
        ema_pytorch(
            beta=0.99, update_every=1, update_after_step=20, inv_gamma=7.0, power=0.75, min_value=0.4, use_foreach=True
        ),
        0.99,
        differs=_NARROW + _COUNTS,
        float32_decay=True,
    ),
    Peer(
        "torch_ema ExponentialMovingAverage(decay=0.9998)",
        "ema:0.9998,preset=tf",
        torch_ema(decay=0.9998),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "torch_ema ExponentialMovingAverage(decay=0.9998, use_num_updates=False)",
        "ema:0.9998,init=start,buffers=copy",
        torch_ema(decay=0.9998, use_num_updates=False),
        0.9998,
        differs=_NARROW,
    ),
    Peer(
        "composer EMA()",
        "ema:preset=composer",
        composer(1000),
        2 ** (-1 / 1000),
        Form.SCALED,
        differs=_NARROW + _COUNTS,
    ),
)


def _formula(label: str, rule: str, begin: Begin) -> Peer:
    return Peer(f"formula of {label}", rule, begin, 0.0)


_FORMULAS = (
    _formula(
        "TensorFlow's ExponentialMovingAverage(num_updates=n)",
        "ema:0.9,preset=tf",
        decays(lambda n: min(0.9, (1 + n) / (10 + n))),
    ),
    _formula("Keras's use_ema", "ema:preset=keras", decays(lambda _: 0.99, copies_first=True)),
    _formula("optax's ema(0.999), debiased", "ema:0.999,warmup=debias", zero_debiased(0.999)),
    _formula("openpi's ema_decay", "ema:preset=openpi", decays(lambda _: 0.99)),
    _formula("NeMo's EMA", "ema:0.999,preset=nemo", decays(lambda _: 0.999)),
    _formula("EDM2's power function 0.05", "power:preset=edm2", decays(power_function(0.05))),
    _formula("EDM2's power function 0.10", "power:sigma_rel=0.1", decays(power_function(0.10))),
    _formula("EDM2's TraditionalEMA", "ema:half_life=40,warmup=half_life,init=start", decays(half_life_ramp(40, 0.05))),
    _formula(
        "EDM's ramp, which is a step behind EDM2's",
        "ema:half_life=40,warmup=half_life,init=start,update_after=1",
        decays(lambda n: half_life_ramp(40, 0.05)(n - 1) if n > 1 else 0.0),
    ),
    _formula(
        "torchtitan's half-life fraction",
        "ema:half_life=inf,warmup=half_life,fraction=0.09,init=start",
        decays(half_life_ramp(math.inf, 0.09)),
    ),
    _formula(
        "Ultralytics's ModelEMA",
        "ema:0.9999,warmup=exponential,init=start",
        decays(lambda n: 0.9999 * (1 - math.exp(-n / 2000))),
    ),
    _formula(
        "mmengine's MomentumAnnealingEMA",
        "ema:0.9998,warmup=timm,gamma=100,power=1",
        decays(lambda n: 1 - max(0.0002, 100 / (100 + n - 1)), copies_first=True),
    ),
    _formula(
        "Mean Teacher's",
        "ema:0.99,warmup=timm,power=1",
        decays(lambda n: min(1 - 1 / n, 0.99)),
    ),
    _formula("LAWA, the last 5 of every 30 steps", "window:5,every=30", mean_of(range(870, STEPS + 1, 30))),
    _formula("WSM, linear", "wsd:start=400,steps=500", merged(400, 500, lambda x: 1 - x)),
    _formula("WSM, root", "wsd:start=400,steps=500,shape=sqrt", merged(400, 500, lambda x: 1 - math.sqrt(x))),
    _formula("WSM, cosine", "wsd:start=400,steps=500,shape=cosine", merged(400, 500, cosine)),
)

PEERS = _TIMM + _TORCH + _OTHERS + _FORMULAS
