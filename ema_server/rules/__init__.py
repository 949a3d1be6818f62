"""The maths of averaging: decays, weights and windows. Floats only, no tensors.

- `contributions`: how much of each step's weights is in an average
- `decays`: how much of an exponential moving average is left after some steps
- `half_life`: how far back an average reaches, for people
- `ledger`: at which steps an average was updated, as arithmetic ranges
- `weights`: what each averaging rule asks of the kernel
- `window`: which snapshots a window average is the mean of, how often each counts, and in which
"""
