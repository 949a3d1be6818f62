"""Measurements, each a ratio to a named rival in the same run. `python -m benchmarks`; see README.md beside this."""
