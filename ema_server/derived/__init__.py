"""Derived versions: computed from stored versions after their publication.

- `queue`: the thread that makes derived versions, one at a time
- `plan`: which stored power averages, with which shares, make another one
- `solve`: least squares between the profiles of power averages
- `combine`: the weighted sum of stored model files
- `recalibration`: a version with other buffers
- `store`: derived versions on disk
"""
