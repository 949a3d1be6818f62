"""Presets: the parameters of a rule that reproduce another library's average.

A preset is expanded when a string is read: the spec and the default name do not mention it. Parameters given beside it
take precedence. docs/guides/averages.md lists the call of each library, and where results differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ema_proto.errors import SHOWN_CHARS, LocalProtocolError

_LENGTHS = {
    "ema": ("decay", "half_life", "half_life_samples", "half_life_epochs"),
    "power": ("sigma_rel", "gamma"),
    "swa": (),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """Parameters of a rule by their keys, as text.

    Args:
        rule: the rule's keyword, `"ema"`, `"swa"` or `"power"`.
        parameters: those that differ from the rule's defaults.
        length: the library's default length, used if none is given.
    """

    rule: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    length: Mapping[str, str] = field(default_factory=dict)


_START, _COPY = {"init": "start"}, {"buffers": "copy"}

PRESETS: Mapping[str, Preset] = {
    "timm-v2": Preset("ema", _START, {"decay": "0.9999"}),
    "timm-v3": Preset("ema", {}, {"decay": "0.9999"}),
    "torch-ema": Preset("ema", _COPY, {"decay": "0.999"}),
    "torch-swa": Preset("swa", _COPY),
    "diffusers": Preset("ema", {"warmup": "tf", "update_after": "1"} | _START | _COPY, {"decay": "0.9999"}),
    "lerobot": Preset("ema", {"warmup": "timm", "power": "0.75"} | _COPY, {"decay": "0.9999"}),
    "openpi": Preset("ema", _START, {"decay": "0.99"}),
    "ema-pytorch": Preset("ema", {"warmup": "timm", "update_after": "100"}, {"decay": "0.9999"}),
    "tf": Preset("ema", {"warmup": "tf"} | _START | _COPY),
    "keras": Preset("ema", _COPY, {"decay": "0.99"}),
    "edm2": Preset("power", _COPY, {"sigma_rel": "0.05"}),
    "composer": Preset("ema", {}, {"half_life": "1000"}),
    "nemo": Preset("ema", _START | _COPY),
    "lightning": Preset("ema", {}, {"decay": "0.999"}),
    "torchvision": Preset("ema", {}),
}


def expanded(rule: str, given: Mapping[str, str]) -> dict[str, str]:
    """`given`, parameters of the rule with this keyword as text, with `preset` replaced by the preset's parameters.

    Raises:
        LocalProtocolError: the preset is unknown, or of another rule.
    """
    own = {key: value for key, value in given.items() if key != "preset"}
    if "preset" not in given:
        return own
    name = given["preset"]
    preset = PRESETS.get(name)
    if preset is None:
        raise LocalProtocolError(f"preset {name[:SHOWN_CHARS]!r} is unknown: use {', '.join(PRESETS)}")
    if preset.rule != rule:
        raise LocalProtocolError(
            f"preset {name!r} is one of {preset.rule}, not of {rule}: use {preset.rule}:…,preset={name}"
        )
    length = {} if any(key in own for key in _LENGTHS[rule]) else dict(preset.length)
    return length | dict(preset.parameters) | own
