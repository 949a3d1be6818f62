"""The averager thread, the only writer of averages: it takes jobs from ingest and HTTP, one after another.

- `averager`: the thread: its loop, which function carries out which job, and what an unexpected error does
- `jobs`: the jobs, their answers, and the queue
- `active_run`: one run in memory, and the state machine that publishes it
- `active_runs`: all runs in memory, the jobs that wait for them, and their statuses
- `apply`: applies a snapshot to the averages, or quarantines it
- `join_policy`: decides what a JOIN leads to
- `join`: carries that decision out
- `rewind`: takes a run back to an older generation
- `change`: adds averages to a run that streams, and removes them
- `delete`: deletes a run that no trainer streams
- `short_runs`: deletes the oldest runs of a few steps that a trainer leaves which begins again and again
- `status`: the status of an average, and of a run that is only on disk
"""
