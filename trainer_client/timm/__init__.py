"""Runs timm's own training script with its averaged model out of process.

The way: `__main__` (arguments) → `known` (is this a timm that we know, and where does it keep its class?) → `run` (put
ours in its place, run the script, finish the runs that it began).
"""
