"""Which tensors of a model are streamed, under which names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.nn.utils import prune

from ema_proto.wire.manifest import Role
from trainer_client.errors import PlanError
from trainer_client.model.plan import Plan
from trainer_client.model.selection import Selection


class Holder(nn.Module):
    """A module with one buffer of the test's choice."""

    def __init__(self, tensor: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("held", tensor, persistent=persistent)


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def _roles(model: nn.Module) -> dict[str, Role]:
    return {spec.name: spec.role for spec in Plan.of(model).manifest.tensors}


def test_pruning_masks_are_structural_and_other_masks_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.25)
    prune.random_unstructured(model[0], "bias", amount=0.5)
    prune.l1_unstructured(model[0], "weight", amount=0.25)  # again: a container of two methods
    model[1].register_buffer("weight_mask", torch.ones(4, 4))

    roles = _roles(model)

    assert {name for name, role in roles.items() if role is Role.STRUCTURAL} == {"0.weight_mask", "0.bias_mask"}
    assert roles["1.weight_mask"] is Role.BUFFER


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_buffers_are_refused_until_the_module_has_run() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(PlanError, match=r"'0\.running_mean'.*forward"):
        Plan.of(model)
    model(torch.zeros(2, 2))

    assert len(Plan.of(model).manifest.tensors) == 3


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_observer_shaped_in_the_first_forward_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), PerChannelMinMaxObserver())
    plan = Plan.of(model)
    model(torch.zeros(1, 2))

    with pytest.raises(PlanError, match=r"'1\.min_val'.*a forward pass.*exclude="):
        plan.renewed(model).tensors()


class Small(nn.Module):
    """A linear layer, a normalisation with buffers, and a layer in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tail = nn.Sequential(nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.norm(self.first(x)))
        return out


def test_names_and_order_are_those_of_the_state_dict() -> None:
    model = Small()

    assert [spec.name for spec in Plan.of(model).manifest.tensors] == list(model.state_dict())


def test_tensors_are_the_live_ones_in_manifest_order() -> None:
    model = Small()
    plan = Plan.of(model)
    state = model.state_dict(keep_vars=True)

    assert all(tensor is state[spec.name] for tensor, spec in zip(plan.tensors(), plan.manifest.tensors, strict=True))


def test_replaced_tensor_is_found() -> None:
    model = Small()
    plan = Plan.of(model)
    model.first.weight.data = torch.full((3, 2), 7.0)
    model.norm.running_mean = torch.full((3,), 8.0)

    tensors = {spec.name: t for spec, t in zip(plan.manifest.tensors, plan.renewed(model).tensors(), strict=True)}

    assert tensors["first.weight"].tolist() == [[7.0, 7.0]] * 3
    assert tensors["norm.running_mean"].tolist() == [8.0] * 3


def test_tied_weights_are_streamed_once_and_keep_their_other_name() -> None:
    manifest = Plan.of(Tied()).manifest

    assert [spec.name for spec in manifest.tensors] == ["embed.weight", "head.bias"]
    assert manifest.tensors[0].aliases == ("head.weight",)


def test_module_used_twice_is_streamed_once() -> None:
    layer = nn.Linear(2, 2)

    manifest = Plan.of(nn.Sequential(layer, layer)).manifest

    assert {spec.name: spec.aliases for spec in manifest.tensors} == {"0.weight": ("1.weight",), "0.bias": ("1.bias",)}


def test_views_of_one_storage_with_another_offset_or_shape_are_not_tied() -> None:
    flat = torch.zeros(8)
    model = nn.Module()
    model.register_buffer("left", flat[:4])
    model.register_buffer("right", flat[4:])
    model.register_buffer("square", flat[:4].view(2, 2))

    assert [spec.aliases for spec in Plan.of(model).manifest.tensors] == [(), (), ()]


def test_non_persistent_buffers_are_left_out_as_in_the_state_dict() -> None:
    assert "held" not in _roles(Holder(torch.zeros(2), persistent=False))


def test_roles_follow_kind_and_requires_grad() -> None:
    model = Small()
    model.first.bias.requires_grad_(False)

    roles = _roles(model)

    assert roles["first.weight"] is Role.PARAM
    assert roles["first.bias"] is Role.FROZEN
    assert roles["norm.num_batches_tracked"] is Role.BUFFER


@pytest.mark.parametrize(
    ("wrap", "vectors"),
    [
        (nn.utils.spectral_norm, {"weight_u", "weight_v"}),
        (nn.utils.parametrizations.spectral_norm, {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_spectral_norm_vectors_are_structural(wrap: Callable[[nn.Module], nn.Module], vectors: set[str]) -> None:
    roles = _roles(wrap(nn.Linear(3, 2)))

    assert {name for name, role in roles.items() if role is Role.STRUCTURAL} == vectors


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.uint16),
        torch.arange(6).view(2, 3).t(),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(1).expand(4),
        torch.get_rng_state(),
    ],
    ids=["0-d", "empty", "bool", "bf16", "f64", "u16", "transposed", "channels_last", "expanded", "rng"],
)
def test_unusual_but_plain_tensors_are_streamed(tensor: Tensor) -> None:
    spec = next(spec for spec in Plan.of(Holder(tensor)).manifest.tensors if spec.name == "held")

    assert spec.shape == tuple(tensor.shape)


def _partitioned() -> Tensor:
    """As DeepSpeed leaves a parameter between two uses (ZeRO stage 3); 0.19.8 was refused alike."""
    tensor = torch.zeros(0)
    tensor.ds_numel = 12  # type: ignore[attr-defined]
    return tensor


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.zeros(3).to_sparse(), "sparse"),
        (lambda: torch.zeros(3, dtype=torch.complex64), "view_as_real"),
        (lambda: torch.zeros(3, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (_partitioned, "ZeRO stage 3"),
        (_quantized, "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_unsupported_tensor_is_refused_by_name(make: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(PlanError, match="'held'") as caught:
        Plan.of(Holder(make()))

    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_module_is_refused_until_it_has_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(PlanError, match=r"'0\.weight'.*forward"):
        Plan.of(model)
    model(torch.zeros(1, 2))

    assert len(Plan.of(model).manifest.tensors) == 2


@pytest.mark.parametrize(
    "make", [nn.ReLU, nn.Sequential, lambda: nn.Linear(0, 0)], ids=["no tensors", "empty", "size 0"]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_model_with_nothing_to_average_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PlanError, match="nothing to average"):
        Plan.of(make())


def test_non_module_is_refused() -> None:
    with pytest.raises(PlanError, match=r"not a torch\.nn\.Module"):
        Plan.of({"weight": torch.zeros(1)})  # type: ignore[arg-type]


class ExtraState(nn.Linear):
    """Keeps something beside its tensors."""

    def __init__(self, inputs: int, outputs: int, state: object = None) -> None:
        super().__init__(inputs, outputs)
        self._state = [state]  # not an attribute of its own: a tensor would not stay one

    def get_extra_state(self) -> object:
        return self._state[0]

    def set_extra_state(self, state: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("state", [{"calls": 1}, torch.zeros(3, dtype=torch.uint8), None])
def test_extra_state_is_left_out_with_one_line(state: object, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(1, 1), ExtraState(1, 1, state), ExtraState(1, 1, state))

    plan = Plan.of(model)
    model[0] = nn.Linear(1, 1)
    plan.renewed(model)

    assert [spec.name for spec in plan.manifest.tensors] == [n for n in model.state_dict() if "_extra_state" not in n]
    assert [("1._extra_state" in r.message, "2 modules" in r.message) for r in caplog.records] == [(True, True)]


def test_extra_state_may_be_excluded_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(1, 1), ExtraState(1, 1))

    assert len(Plan.of(model, Selection(exclude=("*._extra_state",))).manifest.tensors) == 4


def _adding(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[prefix + "scale"] = torch.ones(1)


def _dropping(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del state[prefix + "bias"]


def _computing(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[prefix + "bias"] = state[prefix + "bias"] * 2


@pytest.mark.parametrize(
    ("hook", "name"),
    [(_adding, "0.scale"), (_dropping, "0.bias"), (_computing, "0.bias")],
    ids=["add", "drop", "compute"],
)
def test_state_dict_made_by_a_hook_is_refused_by_name(hook: Callable[..., None], name: str) -> None:
    layer = nn.Linear(1, 1)
    layer._register_state_dict_hook(hook)  # its public name is newer than torch 2.4

    with pytest.raises(PlanError, match=f"'{name}'"):
        Plan.of(nn.Sequential(layer))


def test_unchanged_model_keeps_its_plan() -> None:
    model = Small()
    plan = Plan.of(model)
    model.eval().requires_grad_(False)

    assert plan.renewed(model) is plan


def test_replaced_submodule_of_the_same_shape_is_streamed() -> None:
    model = Small()
    plan = Plan.of(model)
    like = nn.Linear(3, 1)
    model.tail = nn.Sequential(like)

    assert any(tensor is like.weight for tensor in plan.renewed(model).tensors())


def _grow(model: Small) -> None:
    model.tail.append(nn.Linear(1, 1))


def _add_parameter(model: Small) -> None:
    model.first.scale = nn.Parameter(torch.ones(1))


def _fill_buffer(model: Small) -> None:
    model.norm.register_buffer("late", torch.ones(1))


def _remove(model: Small) -> None:
    model.first.register_parameter("bias", None)


def _resize(model: Small) -> None:
    model.first.weight = nn.Parameter(torch.zeros(3, 4))


def _cast(model: Small) -> None:
    model.to(torch.float64)


def _reassign(model: Small) -> None:
    model.norm.running_var = torch.zeros(3, 1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_grow, "tail.1.weight"),
        (_add_parameter, "first.scale"),
        (_fill_buffer, "norm.late"),
        (_remove, "first.bias"),
        (_resize, "first.weight"),
        (_cast, "first.weight"),
        (_reassign, "norm.running_var"),
    ],
)
def test_changed_names_dtype_or_shape_are_refused_by_name(change: Callable[[Small], None], name: str) -> None:
    model = Small()
    plan = Plan.of(model)
    change(model)

    with pytest.raises(PlanError, match=f"'{name}'"):
        plan.renewed(model).tensors()


def test_untied_weights_are_refused() -> None:
    model = Tied()
    plan = Plan.of(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())

    with pytest.raises(PlanError, match="tied"):
        plan.renewed(model)


def test_weights_tied_through_replaced_storage_stay_tied() -> None:
    model = Tied()
    plan = Plan.of(model)
    model.embed.weight.data = torch.ones(5, 3)

    assert plan.renewed(model) is plan


def test_weights_tied_after_joining_are_streamed_under_both_names() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(5, 3))
    plan = Plan.of(model)
    model.head.weight = model.embed.weight
    model.embed = nn.Embedding(5, 3)  # has the plan renewed
    model.head.weight = model.embed.weight

    renewed = plan.renewed(model)

    assert renewed is not plan
    assert renewed.manifest.digest == plan.manifest.digest
    assert [tensor is model.embed.weight for tensor in renewed.tensors()] == [True, True, False]


def test_another_model_of_the_same_shape_is_accepted() -> None:
    plan, other = Plan.of(Small()), Small()

    assert plan.renewed(other).tensors()[0] is other.first.weight


def test_another_model_of_another_shape_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'0\.weight' is new"):
        Plan.of(Small()).renewed(nn.Sequential(nn.Linear(9, 9)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_modules_are_streamed() -> None:
    model = Small()
    scripted = torch.jit.script(model)

    plan = Plan.of(scripted)

    assert plan.manifest.digest == Plan.of(model).manifest.digest
    assert plan.renewed(scripted) is plan
