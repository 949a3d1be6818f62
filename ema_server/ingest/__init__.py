"""From the socket to whole, finite snapshots.

- `ingest`: the ingest thread: frames in, jobs for the averager out
- `peers`: ends connections that are not understood
- `link`: the ROUTER socket
- `local_socket`: the unix socket on which trainers of the same machine pass their slots
- `companion_files`: the thread that stores companion files
- `staging`: the slots of a trainer, and the way of each rank's chunks into them
"""
