"""Which optimizer steps happened, and when the snapshot of one is due.

- `hooks`: follows the optimizers of a model, and calls back after every real step
- `optimizers`: the optimizer that really steps, inside wrappers or around another
- `rounds`: after whose step a snapshot is taken when there are several optimizers
- `watch`: notices weights that are written while no step is counted
"""
