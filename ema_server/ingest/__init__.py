"""From the socket to whole, finite snapshots.

- `finite`: finds NaN and Inf in the averaged tensors of a snapshot, chunk by chunk, while each c
- `ingest`: the ingest thread
- `link`: the ROUTER socket
- `slots`: host memory that snapshots arrive in
"""
