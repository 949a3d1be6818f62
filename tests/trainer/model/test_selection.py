"""Streams of a part of a model: what patterns and `trainable_only` choose, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer_client.errors import PlanError
from trainer_client.model.plan import Plan
from trainer_client.model.selection import Selection


class LowRank(nn.Module):
    """A frozen layer with a trained correction of low rank beside it, as LoRA has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, width))
        self.lora_B = nn.Parameter(torch.zeros(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.lora_A.T @ self.lora_B.T
        return out


def _adapted() -> nn.Sequential:
    return nn.Sequential(LowRank(4), nn.BatchNorm1d(4).requires_grad_(False), LowRank(4))


_ADAPTERS = ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


def _names(model: nn.Module, **given: Any) -> list[str]:
    return [spec.name for spec in Plan.of(model, Selection(**given)).manifest.tensors]


def test_trainable_only_selects_parameters_that_require_a_gradient() -> None:
    assert _names(_adapted(), trainable_only=True) == _ADAPTERS
    assert "1.running_mean" not in _names(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), trainable_only=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"include": ("*lora_*",)}, _ADAPTERS),
        (
            {"include": ("0.*", "1.running_*"), "exclude": ("*.base.*",)},
            ["0.lora_A", "0.lora_B", "1.running_mean", "1.running_var"],
        ),
        ({"trainable_only": True, "exclude": ("2.*",)}, ["0.lora_A", "0.lora_B"]),
    ],
    ids=["include", "exclude", "both"],
)
def test_patterns_select_by_canonical_name(given: dict[str, Any], expected: list[str]) -> None:
    assert _names(_adapted(), **given) == expected
    assert _names(nn.DataParallel(_adapted()), **given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"include": ("*lora_*", "haed.*")}, r"'haed\.\*' of include= matches no tensor.*0\.lora_A, .*, \.\.\."),
        ({"exclude": ("3.*",)}, r"'3\.\*' of exclude="),
        (
            {"include": ("0.*",), "exclude": ("*",)},
            r"nothing of the model is chosen by include=\['0\.\*'\] and exclude=",
        ),
        ({"trainable_only": True, "include": ("1.*",)}, "trainable_only=True"),
    ],
)
def test_unmatched_pattern_or_selection_is_refused_with_existing_names(given: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        _names(_adapted(), **given)


def test_unselected_tensors_may_be_of_any_kind() -> None:
    """A packed base with an adapter: the base's tensors and what it adds to the state dict are passed over."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.ones(3, dtype=torch.complex64))
            self.lora_A = nn.Parameter(torch.ones(2))

        def get_extra_state(self) -> str:
            return "scales"

        def set_extra_state(self, state: Any) -> None:
            assert state == "scales"

    assert _names(Packed(), include=("lora_*",)) == ["lora_A"]
    with pytest.raises(PlanError, match="complex"):
        _names(Packed())


def test_selection_is_kept_when_parameters_or_modules_change() -> None:
    model = _adapted()
    plan = Plan.of(model, Selection(trainable_only=True))
    model.requires_grad_(False)
    model[1].requires_grad_(True)
    replaced = LowRank(4)
    model[2] = replaced

    fresh = plan.renewed(model)
    assert fresh.manifest.digest == plan.manifest.digest
    assert fresh.tensors()[3] is replaced.lora_B
    model.append(LowRank(4))
    with pytest.raises(PlanError, match=r"'3\.lora_A'"):
        fresh.renewed(model)


def test_tied_tensor_is_selected_by_each_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight

    (both,) = Plan.of(model, Selection(include=("*.weight",))).manifest.tensors
    (one,) = Plan.of(model, Selection(include=("head.weight",))).manifest.tensors
    assert (both.name, both.aliases) == ("embed.weight", ("head.weight",))
    assert (one.name, one.aliases) == ("head.weight", ())
