"""One run in memory: its averages, its state, its status.

- `average`: one average of a run
- `rate`: steps per second over the newest snapshots
- `restore`: from a generation on disk back to a run in memory
- `rewind`: which averages a run has after it went back to an older generation
- `run`: a run in memory
- `status_store`: the state of every run, for whoever wants to look
"""
