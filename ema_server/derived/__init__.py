"""Versions computed from stored versions.

- `combine`: the weighted sum of stored model files, piece by piece
- `plan`: from a ring's snapshots to the plan for one more power average
- `queue`: makes derived versions, one at a time, in a thread of its own
- `recalibration`: a version with other buffers
- `solve`: which shares of stored power-function averages add up to another one
- `store`: versions made of other versions after them
"""
