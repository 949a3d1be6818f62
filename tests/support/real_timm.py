"""The averaging classes of the installed timm, without the rest of it, which requires torchvision."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest


@cache
def model_ema() -> ModuleType:
    """The file `utils/model_ema.py` of timm, as a separate module; skips the test where timm is not installed."""
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    spec = importlib.util.spec_from_file_location("timm_model_ema", Path(timm.origin).parent / "utils" / "model_ema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
