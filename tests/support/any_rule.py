"""Hypothesis strategies for rules: with any allowed parameters, or with parameters that affect a short run."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from ema_proto.averages.rules import AverageSpec, Bema, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.limits import QUANTITY_MAX, QUANTITY_MIN, STEP_MAX, WINDOW_MAX

_PATTERN = st.text("abz0189.*?_[]-!", min_size=1, max_size=12)
_QUANTITY = st.floats(QUANTITY_MIN, QUANTITY_MAX, exclude_max=True)
_SHARE = st.floats(0.0, 1.0, exclude_max=True)
_STEPS = st.integers(0, STEP_MAX)
_TREATMENT = {
    "buffers": st.sampled_from(["average", "copy"]),
    "include": st.lists(_PATTERN, max_size=3).map(tuple),
    "exclude": st.lists(_PATTERN, max_size=3).map(tuple),
    "accumulator": st.sampled_from(["float32", "float64"]),
}
_WARMUPS: dict[str | None, dict[str, st.SearchStrategy[object]]] = {
    None: {"init": st.sampled_from(["first", "start"])},
    "timm": {"gamma": _QUANTITY, "power": _QUANTITY, "min_decay": _SHARE},
    "tf": {"init": st.sampled_from(["first", "start"])},
    "exponential": {"tau": _QUANTITY, "init": st.sampled_from(["first", "start"])},
    "half_life": {"fraction": _QUANTITY, "init": st.sampled_from(["first", "start"])},
    "debias": {},
}
_SHORT = {
    "gamma": st.floats(0.2, 50.0),
    "power": st.floats(0.3, 3.0),
    "tau": st.floats(0.5, 100.0),
    "fraction": st.floats(0.01, 2.0),
    "min_decay": st.sampled_from([0.0, 0.5, 0.95]),
}
_DECAYS = st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.9999, 1 - 2.0**-30])


def _emas(
    lengths: st.SearchStrategy[dict[str, float]], update_after: st.SearchStrategy[int], *, short: bool
) -> list[st.SearchStrategy[Ema]]:
    kinds = []
    for warmup, parameters in _WARMUPS.items():
        chosen = {key: _SHORT.get(key, value) if short else value for key, value in parameters.items()}
        shared = {} if short else _TREATMENT
        keywords = st.fixed_dictionaries({}, optional={**chosen, **shared, "update_after": update_after})
        made = st.builds(
            lambda warmup, length, others: Ema(name="x", warmup=warmup, **length, **others),
            st.just(warmup),
            lengths,
            keywords,
        )
        kinds.append(made)
    return kinds


def any_rules() -> st.SearchStrategy[AverageSpec]:
    """Rules named `x`, with any allowed parameters."""
    lengths = st.one_of(
        st.fixed_dictionaries({"decay": _SHARE}),
        *(st.fixed_dictionaries({key: _QUANTITY}) for key in ("half_life", "half_life_samples", "half_life_epochs")),
    )
    name = st.just("x")
    every = st.integers(1, STEP_MAX)
    return st.one_of(
        *_emas(lengths, _STEPS, short=False),
        st.builds(PowerEma, st.floats(1e-6, 0.28867), name, **_TREATMENT),
        st.builds(
            lambda gamma, name, buffers: PowerEma(gamma=gamma, name=name, buffers=buffers),
            st.floats(0, 999_999),
            name,
            _TREATMENT["buffers"],
        ),
        st.builds(Uniform, _STEPS, every, name, **_TREATMENT),
        st.builds(Window, st.integers(1, WINDOW_MAX), every, name, **_TREATMENT),
        st.builds(Wsd, _STEPS, every, st.sampled_from(["linear", "sqrt", "cosine"]), name, **_TREATMENT),
        any_bemas(),
        st.builds(Raw, name),
    )


def any_bemas() -> st.SearchStrategy[Bema]:
    """Rules `bema` named `x`, with any allowed parameters."""
    return _bemas(_STEPS, st.integers(1, STEP_MAX), _QUANTITY)


def _bemas(
    update_after: st.SearchStrategy[int], every: st.SearchStrategy[int], quantity: st.SearchStrategy[float]
) -> st.SearchStrategy[Bema]:
    parameters = {
        "ema_power": quantity,
        "bias_power": quantity,
        "lag": quantity.map(lambda value: 1.0 + value / 2),
        "multiplier": quantity,
        "min_weight": _SHARE,
        "update_after": update_after,
        "buffers": st.sampled_from(["average", "copy"]),
        "accumulator": st.sampled_from(["float32", "float64"]),
    }
    return st.builds(
        lambda every, given: Bema(every, name="x", **given), every, st.fixed_dictionaries({}, optional=parameters)
    )


def short_bemas() -> st.SearchStrategy[Bema]:
    """Rules `bema` that are updated within 200 steps."""
    return _bemas(st.integers(0, 40), st.integers(1, 12), st.floats(0.05, 2.0))


@cache
def short_rules(origin: int) -> st.SearchStrategy[AverageSpec]:
    """Rules whose memory, warm-up, start and cadence take effect within 200 steps after `origin`."""
    lengths = st.one_of(
        st.fixed_dictionaries({"decay": _DECAYS}),
        st.fixed_dictionaries({"half_life": st.floats(0.1, 1000.0)}),
        st.fixed_dictionaries({"half_life_samples": st.floats(1.0, 10_000.0)}),
        st.fixed_dictionaries({"half_life_epochs": st.floats(0.01, 10.0)}),
    )
    start = st.integers(max(0, origin - 60), origin + 150)
    return st.one_of(
        *_emas(lengths, st.integers(0, 40), short=True),
        st.builds(
            lambda fraction: Ema(half_life=float("inf"), warmup="half_life", fraction=fraction), st.floats(0.01, 2)
        ),
        st.builds(PowerEma, st.floats(0.005, 0.28), st.just("x")),
        st.builds(lambda gamma: PowerEma(gamma=gamma, name="x"), st.floats(0, 30)),
        st.builds(Uniform, start, st.integers(1, 12)),
        st.builds(Wsd, start, st.integers(1, 120), st.sampled_from(["linear", "sqrt", "cosine"])),
        st.just(Raw()),
    )
