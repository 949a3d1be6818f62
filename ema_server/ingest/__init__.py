"""From the socket to whole, finite snapshots.

- `ingest`: the ingest thread: frames in, jobs for the averager out
- `link`: the ROUTER socket
- `finite`: NaN and Inf in a snapshot, and the slots that snapshots arrive in
- `companion_files`: the thread that stores companion files
"""
