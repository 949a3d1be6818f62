"""`ema demo`: a server, a trainer and an evaluation worker on real data, each its own process.

- `command`: options, progress bars, and the report
- `run`: starts the three processes, watches them and collects the results
- `child`: starts, watches and stops one process
- `train`: the trainer
- `evaluate`: the function that the evaluation worker calls
- `digits`: the data and the network
- `record`: the trainer's own record of its weights
- `replay`: recomputes averages from that record, to compare them with the server's
"""
