"""Recomputed BatchNorm statistics: their values, what stays unchanged, the arguments of the model, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_reader.errors import RecalibrationFailed
from ema_reader.evaluation.batchnorm import arguments_of, recalibrating, recomputed

CPU = torch.device("cpu")
EPS32 = 2.0**-23


class Net(nn.Module):
    """Two layers of statistics with dropout between them, and one that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4, momentum=0.3)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 3)
        self.second = nn.BatchNorm1d(3, affine=False)
        self.unused = nn.BatchNorm1d(2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """`[n, 4]` to `[n, 3]`."""
        y: Tensor = self.second(self.linear(self.dropout(self.first(x if shift is None else x + shift))))
        return y


def batches(count: int = 5, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [3 + 2 * torch.randn(*(shape or (16, 4)), generator=generator) for _ in range(count)]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A state whose statistics all differ from the recomputed ones."""
    torch.manual_seed(3)
    return {
        name: tensor + 7 if name.endswith("tracked") else torch.rand_like(tensor) + 0.5
        for name, tensor in model.state_dict().items()
    }


def by(model: nn.Module, given: Iterable[Any]) -> Callable[[], tuple[nn.Module, Iterable[Any]]]:
    return lambda: (model, given)


def oracle(state: dict[str, Tensor], given: list[Tensor]) -> dict[str, Tensor]:
    """The statistics of `Net` in float64, layer by layer."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    inner = []
    for x in (batch.double() for batch in given):
        normal = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        y = normal * wide["first.weight"] + wide["first.bias"]
        inner.append(y @ wide["linear.weight"].T + wide["linear.bias"])
    found = {}
    for layer, inputs in (("first", [x.double() for x in given]), ("second", inner)):
        found[f"{layer}.running_mean"] = torch.stack([x.mean(0) for x in inputs]).mean(0)
        found[f"{layer}.running_var"] = torch.stack([x.var(0) for x in inputs]).mean(0)
    return found


def test_statistics_are_means_over_the_batches_without_dropout() -> None:
    state, given = trained(Net()), batches()
    found = recomputed(state, "m:f", by(Net(), given))

    expected = oracle(state, given)
    assert set(found) == {*expected, "first.num_batches_tracked", "second.num_batches_tracked"}
    for name, value in expected.items():
        bound = 16 * 16 * EPS32 * value.abs().max().clamp(min=1).item()  # 16 rows, a few operations on each
        torch.testing.assert_close(found[name].double(), value, atol=bound, rtol=0)
    assert found["first.num_batches_tracked"].item() == len(given)


def test_statistics_equal_those_of_update_bn() -> None:
    model, given = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)),
        batches(3, 8, 1, 6, 6),
    )
    state = trained(model)
    theirs = copy.deepcopy(model)
    theirs.load_state_dict(state)
    torch.optim.swa_utils.update_bn(given, theirs)

    found = recomputed(state, "m:f", by(model, given))
    assert len(found) == 3
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in found.items())


def test_weights_modes_and_momenta_are_unchanged_and_no_gradient_is_computed() -> None:
    model, state = Net(), trained(Net())
    model.second.eval()
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = recomputed(state, "m:f", by(model, batches()))

    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    others = set(state) - set(found)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in others)
    assert [layer.training for layer in (model, model.first, model.dropout, model.second)] == [True, True, True, False]
    assert (model.first.momentum, model.second.momentum) == (0.3, 0.1)
    assert all(p.grad is None for p in model.parameters())
    assert not any(tensor.requires_grad for tensor in found.values())


def test_modes_are_restored_when_the_model_raises() -> None:
    model = Net().eval()
    with pytest.raises(RecalibrationFailed):
        recomputed(trained(model), "m:f", by(model, [torch.zeros(2, 99)]))

    assert not any(module.training for module in model.modules())
    assert model.first.momentum == 0.3


def test_statistics_do_not_change_when_the_model_is_used_again() -> None:
    model, state = Net(), trained(Net())
    first = recomputed(state, "m:f", by(model, batches()))
    before = {name: tensor.clone() for name, tensor in first.items()}
    recomputed(state, "m:f", by(model, [10 * batch for batch in batches()]))

    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())


class Derived(nn.BatchNorm2d):
    """A subclass, as in timm: with a dropout of its own, and a mode that `train` does not change."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.inner = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Derived:
        """Frozen."""
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then drop out."""
        y: Tensor = self.inner(super().forward(x))
        return y


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(2), (8, 2)),
        (nn.BatchNorm1d(2), (8, 2, 5)),
        (nn.BatchNorm2d(2), (8, 2, 5, 5)),
        (nn.BatchNorm3d(2), (4, 2, 3, 3, 3)),
        (nn.SyncBatchNorm(2), (8, 2, 5)),
        (nn.BatchNorm2d(2, momentum=None), (8, 2, 5, 5)),
        (Derived(2), (8, 2, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_batch_norm_is_recomputed(layer: nn.Module, shape: tuple[int, ...]) -> None:
    given = batches(3, *shape)
    found = recomputed(trained(layer), "m:f", by(layer, given))

    over = [dim for dim in range(len(shape)) if dim != 1]
    mean = torch.stack([x.double().mean(over) for x in given]).mean(0)
    torch.testing.assert_close(found["running_mean"].double(), mean, atol=1e-4, rtol=0)
    assert set(found) == {"running_mean", "running_var", "num_batches_tracked"}


def test_shared_layer_is_recomputed_under_both_names() -> None:
    layer = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    model.forward = layer.forward
    found = recomputed(trained(model), "m:f", by(model, batches()))

    assert torch.equal(found["a.running_mean"], found["b.0.running_mean"])


def test_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    model, state = Net(), trained(Net())
    found = recomputed(state, "m:f", by(model, batches()))

    assert not any(name.startswith("unused") for name in found)
    assert torch.equal(model.state_dict()["unused.running_mean"], state["unused.running_mean"])


def test_shapes_and_dtypes_are_those_of_the_weights() -> None:
    state = trained(Net())
    found = recomputed(state, "m:f", by(Net().double(), [batch.double() for batch in batches()]))

    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (state[name].dtype, state[name].shape) for name in found
    }


X, Y = torch.ones(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "positional", "named"),
    [
        (X, (X,), {}),
        ((X, Y), (X,), {}),
        ([X, Y, Y], (X,), {}),
        (((X, Y), Y), (X, Y), {}),
        ([[X, Y]], (X, Y), {}),
        ({"x": X, "shift": Y}, (), {"x": X, "shift": Y}),
        (({"x": X}, Y), (), {"x": X}),
        (((X, {"mask": Y}), Y), (X, {"mask": Y}), {}),
        ((X, {"not": "passed"}), (X,), {}),
        (((X, None, 3),), (X, None, 3), {}),
    ],
)
def test_batch_determines_the_arguments_of_the_model(batch: object, positional: tuple[Any, ...], named: Any) -> None:
    assert arguments_of(batch, CPU) == (positional, named)


def test_every_tensor_of_a_batch_is_moved_to_the_device_of_the_weights() -> None:
    positional, named = arguments_of((({"x": [X, (Y,)]}, X), Y), torch.device("meta"))

    assert named == {}
    assert positional[0]["x"][0].is_meta
    assert positional[0]["x"][1][0].is_meta
    assert positional[1].is_meta


def test_dict_batches_are_passed_by_name() -> None:
    state = trained(Net())
    plain = recomputed(state, "m:f", by(Net(), [batch + 1 for batch in batches()]))
    named = recomputed(state, "m:f", by(Net(), [{"x": batch, "shift": torch.ones(())} for batch in batches()]))

    assert all(torch.equal(plain[name], named[name]) for name in plain)


def _raising() -> tuple[nn.Module, Iterable[Any]]:
    raise FileNotFoundError("no such data set")


def _torn() -> tuple[nn.Module, Iterable[Any]]:
    def given() -> Iterator[Tensor]:
        yield batches()[0]
        raise OSError("the archive is cut off")

    return Net(), given()


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (_raising, "FileNotFoundError: no such data set"),
        (_torn, "OSError: the archive is cut off"),
        (by(Net(), []), "yields no batch"),
        (by(Net(), [()]), "a batch is empty"),
        (by(Net(), [torch.zeros(1, 4)]), "ValueError: Expected more than 1 value per channel"),
        (by(Net(), [{"label": X}]), "unexpected keyword argument 'label'"),
        (by(Net(), [torch.full((2, 4), float("nan"))]), "first.running_mean is not finite"),
        (by(nn.Linear(4, 3), [X]), "Missing key|Unexpected key"),
        (lambda: [X], "returned list: return \\(model, batches\\)"),
        (lambda: (X, Net()), "returned tuple: return \\(model, batches\\)"),
        (lambda: (Net(), 3), "the batches are int"),
    ],
)
def test_error_names_the_loader_and_the_reason(loader: Any, said: str) -> None:
    with pytest.raises(RecalibrationFailed, match=rf"(?s)^my_data:calibration: .*({said})"):
        recomputed(trained(Net()), "my_data:calibration", loader)


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))])
def test_model_without_running_statistics_is_refused(model: nn.Module) -> None:
    with pytest.raises(RecalibrationFailed, match="has no BatchNorm layer with running statistics"):
        recomputed(trained(model), "m:f", by(model, [X]))


def test_evaluation_function_gets_all_weights_with_the_new_statistics() -> None:
    state, seen = trained(Net()), {}

    def look(given: dict[str, Tensor]) -> dict[str, float]:
        seen.update(given)
        return {"a": 1.0}

    assert recalibrating(look, "m:f", by(Net(), batches()))(state) == {"a": 1.0}
    found = recomputed(state, "m:f", by(Net(), batches()))
    assert list(seen) == list(state)
    assert all(torch.equal(seen[name], {**state, **found}[name]) for name in state)
