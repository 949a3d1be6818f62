"""Leases, validations, reported metrics, and the evaluator process.

- `lease_rows`: the rows of leases and validations
- `lease_store`: leases and requested validations, in the metrics' database
- `leases`: leases and validations as values
- `metric_store`: evaluation metrics by version, in SQLite
- `scheduler`: who evaluates what
- `worker`: the server's own evaluation worker
"""
