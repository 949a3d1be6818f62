"""Which buffers are structural: state that belongs to one set of weights and means nothing when averaged.

Comes in: a module. Goes out: the names of such buffers. The singular vectors of spectral norm are the ones there are:
averaged, they are no longer the vectors of the averaged weight. (RNG states are integers, which are copied anyway.)
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm


def structural_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the module's own buffers that are structural, for both forms of spectral norm."""
    if isinstance(module, parametrizations._SpectralNorm):
        return frozenset({"_u", "_v"})
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return frozenset(f"{hook.name}_{vector}" for hook in hooks for vector in "uv")
