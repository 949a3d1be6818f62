"""Runs timm's own training script with its averaged model out of process.

- `client`: a client that can also replace the averages, for `RemoteModelEma`, which begins with
- `fetch`: the way back of an average, from the server to the trainer, over HTTP
- `known`: what this timm averages with, and whether we can take its place
- `module_copy`: a module of the trainer's own kind that holds averaged weights
- `remote`: `RemoteModelEma`
- `run`: puts `RemoteModelEma` in the place of timm's class, runs a script as Python would, an
"""
