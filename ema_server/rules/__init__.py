"""The mathematics of averaging: floats and steps, no tensors.

- `weights`: the weight of a snapshot in an average, for each rule; decay and half-life for display
- `decays`: products of the decays of an exponential moving average
- `correction`: the bias correction of a `bema`
- `window`: which snapshots a window average holds
- `ledger`: the steps at which an average was updated
- `initial_share`: the warning about an average that is still mostly the weights it began with
- `contributions`: the share of each step in an average, from its rule and its ledger
"""
