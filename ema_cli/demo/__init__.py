"""The whole service at work on real data: a server, a trainer and an evaluation worker, each its own process.

- `child`: one process of the demo
- `command`: `ema demo`
- `digits`: real data without a download
- `evaluate`: what the demo's evaluation worker calls
- `record`: the trainer's own record of its weights
- `replay`: does the server's average equal what it says it did? Comes in
- `run`: runs the main job
- `train`: the demo's trainer, a process of its own
"""
