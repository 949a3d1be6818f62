"""The server: receives snapshots, keeps running averages, makes them durable, and serves versions over HTTP.

Packages, each of which imports only those listed before it:

- `rules`: the mathematics of averaging
- `tensors`: which byte is where, in memory and in a file
- `compute`: where averages are kept, and the arithmetic on them
- `storage`: what is on disk, and how it is read
- `runs`: one run in memory
- `publishing`: from memory to a durable generation, retention, the ring
- `averager`: the one thread that writes averages
- `derived`: versions computed from stored versions
- `evaluation`: leases, validations, reported metrics, the evaluator process
- `ingest`: from the socket to whole, finite snapshots
- `http`: the ASGI application

`server` composes them, `cli` is `ema serve`, `config` holds the settings, `telemetry` the counters, and `addresses`
resolves the names that the sockets listen on.
"""
