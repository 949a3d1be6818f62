"""One run in memory, and what is published of its status.

- `run`: the run: averages, ledger, counters, and how a snapshot updates them
- `average`: one average: its rule, memory and history
- `restore`: reads a run from a generation on disk
- `status_store`: the latest status of every run, for any thread
- `lanes`: how the trainer of each run sends its snapshots; for any thread
- `ranks`: the ranks of sharded trainers: who is missing, which steps were dropped; for any thread
"""
