"""Averaging rules as values and as strings.

- `exponential`: the exponential moving average as a value
- `parameters`: what the rules' parameters have in common
- `presets`: what other libraries compute, as one table
- `profiles`: the width of a power-function average
- `rules`: the other rules as values, and the type of them all
- `specs`: averaging rules as strings
- `step_units`: how fast a trainer goes, for rules that are given in samples or epochs
"""
