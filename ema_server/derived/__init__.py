"""Derived versions: computed from stored versions after their publication.

- `queue`: the thread that makes derived versions, one at a time
- `plan`: which stored power averages, with which shares, make another one
- `solve`: least squares between the profiles of power averages
- `blend`: which versions, with which weights, are added up
- `combine`: the weighted sum of stored model files
- `recalibration`: a version with other buffers
- `run_model`: the manifest of a run, and what is exempt from averaging
- `store`: derived versions on disk
"""
