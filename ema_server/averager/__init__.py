"""The one thread that writes averages.

- `active_run`: what is under way for one run besides its averages
- `active_runs`: the runs in memory, and what the status store shows of all runs
- `apply`: snapshots into averages, or into quarantine
- `averager`: the averager thread
- `change`: adds averages to a run that streams, and removes them
- `inbox`: jobs waiting for the averager
- `jobs`: what the ingest side and HTTP ask of the averager, and what it answers
- `join`: lets trainers in
- `join_policy`: what a JOIN leads to
- `publish`: how a run's state becomes a generation
- `schedule`: when a run is due for a generation that nobody asked for
- `status`: builds the status of a run in memory, and of one that is only on disk
"""
