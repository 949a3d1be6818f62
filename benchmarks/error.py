"""Error of float32 averages after many updates: ours, and those of other libraries.

The weights take a random walk, and every average sees the same one. The exact average is computed in numpy's long
double, so that float64 shows an error too. An error is the root mean square of the difference, over that of the exact
average.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks.kernel import arithmetics
from benchmarks.result import Row, Section, Spread
from ema_server.compute.arithmetic import Arithmetic, Elements

_DECAY = 0.9998
_STEP = 0.01  # standard deviation of a step of the walk, which begins at values of deviation 1
_EXACT = ", float64"

_Exact = np.ndarray[tuple[int, ...], np.dtype[np.longdouble]]

Average = tuple[Callable[[], None], Tensor]
"""Takes the walk's weights in; what it holds."""


class Weights(nn.Module):
    """A model that is one parameter."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(elements), requires_grad=False)


def measure(*, quick: bool) -> Section:
    """10,000 updates of 4,096 elements, by several walks."""
    updates, elements, walks = (200, 256, 2) if quick else (10_000, 4_096, 5)
    found: dict[str, list[float]] = {}
    for seed in range(walks):
        for name, error in errors(updates, elements, seed).items():
            found.setdefault(name, []).append(error)
    ours = [name for name in found if name.startswith("ours")]
    rows = [_row(found, ours[0], name) for name in found if name not in ours]
    rows += [_row(found, name, ours[0]) for name in ours[1:]]
    title = f"error: after {updates:,} updates of a random walk, decay {_DECAY}, float32"
    note = "" if _timm() else "**Without timm's class: timm is not installed.**"
    return Section(title, "rival", tuple(rows), note)


def errors(updates: int, elements: int, seed: int) -> dict[str, float]:
    """The relative error of each way to average, by its name; ours begin with "ours"."""
    torch.manual_seed(seed)
    model = Weights(elements)
    averages, exact = _ours(model.weight) | _others(model), model.weight.numpy().astype(np.longdouble)
    for _ in range(updates):
        model.weight.add_(torch.randn(elements), alpha=_STEP)
        for update, _ in averages.values():
            update()
        exact += (1 - _DECAY) * (model.weight.numpy() - exact)
    return {name: _relative(held, exact) for name, (_, held) in averages.items()}


def _relative(held: Tensor, exact: _Exact) -> float:
    return float(np.sqrt(np.mean((held.detach().numpy() - exact) ** 2) / np.mean(exact**2)))


def _ours(weight: Tensor) -> dict[str, Average]:
    kinds = ((torch.float32, ""), (torch.float64, _EXACT))
    return {
        f"ours, {arithmetic.name}{suffix}": _held(arithmetic, weight, dtype)
        for dtype, suffix in kinds
        for arithmetic in arithmetics()
    }


def _held(arithmetic: Arithmetic, weight: Tensor, dtype: torch.dtype) -> Average:
    held, scratch = weight.to(dtype, copy=True), {dtype: torch.empty(len(weight), dtype=dtype)}
    return lambda: arithmetic.lerp(Elements(weight.detach(), scratch), [(held, 1 - _DECAY)]), held


def _others(model: Weights) -> dict[str, Average]:
    """The classes of timm and torch; for diffusers and NeMo, their expressions."""
    weight, found = model.weight, dict[str, Average]()
    if (timm := _timm()) is not None:
        theirs = timm.ModelEmaV3(model, decay=_DECAY)
        found["timm `ModelEmaV3`"] = (lambda: theirs.update(model), theirs.module.weight)
    many = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    one = AveragedModel(model, avg_fn=get_ema_avg_fn(_DECAY))
    for averaged in (many, one):
        averaged.update_parameters(model)  # the first update copies
    found["torch `get_ema_multi_avg_fn`"] = (lambda: many.update_parameters(model), _weight(many.module))
    found["torch `get_ema_avg_fn`"] = (lambda: one.update_parameters(model), _weight(one.module))
    held = weight.clone()
    found["`e -= (1 - d) * (e - p)`, as in diffusers"] = (lambda: _subtract(held, weight), held)
    scaled = weight.clone()
    found["`e *= d; e += (1 - d) * p`, as in NeMo"] = (lambda: _scale(scaled, weight), scaled)
    return found


def _weight(module: nn.Module) -> Tensor:
    (weight,) = module.parameters()
    return weight.detach()


def _subtract(held: Tensor, weight: Tensor) -> None:
    held.sub_((1 - _DECAY) * (held - weight))


def _scale(held: Tensor, weight: Tensor) -> None:
    torch._foreach_mul_([held], _DECAY)
    torch._foreach_add_([held], [weight], alpha=1 - _DECAY)


def _row(found: dict[str, list[float]], ours: str, rival: str) -> Row:
    ratio, aim = Spread.ratio(found[ours], found[rival]), "none" if _EXACT in ours else "≤ 1.05"
    return Row(ours, _shown(found[ours]), f"{_shown(found[rival])}, {rival}", ratio, aim)


def _shown(values: list[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.median:.2e} ({spread.low:.2e} to {spread.high:.2e})"


def _timm() -> ModuleType | None:
    """The file of timm that defines its averages; the rest of timm requires torchvision."""
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        return None
    path = Path(timm.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
