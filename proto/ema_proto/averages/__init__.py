"""Averaging rules as values and as strings.

- `rules`: `Ema`, `PowerEma`, `Uniform`, `Window`, `Wsd` and `Raw` as values
- `parameters`: the kinds of a rule's parameters, from which its checks, its spec and its default name follow
- `specs`: strings to rules
- `presets`: the parameters that reproduce other libraries
- `step_units`: samples per step and steps per epoch, for rules in samples or epochs
- `profiles`: the relative width of a power-function average and its exponent
"""
