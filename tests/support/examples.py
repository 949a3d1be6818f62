"""How many examples property tests take: all of them, or fewer in the inner loop (`-m "not process"`)."""

from __future__ import annotations

from hypothesis import settings

_FEWER = 4


def load_profile(*, inner_loop: bool) -> None:
    """Choose for this process; before the tests are imported."""
    name, count = ("ema-inner-loop", 100 // _FEWER) if inner_loop else ("ema", 100)
    settings.register_profile(name, deadline=None, max_examples=count)  # an example's duration depends on the load
    settings.load_profile(name)


def examples(count: int) -> int:
    """The number of examples for a test that takes `count` of them outside the inner loop."""
    return max(1, count * settings().max_examples // 100)
