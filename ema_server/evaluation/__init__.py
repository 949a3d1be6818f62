"""Evaluation: reported metrics, leases and validations in one SQLite database, and the evaluator process.

- `metric_store`: the database, its thread, and reported metrics
- `leases`: leases and validations as values
- `lease_queries`: queries on leases and validations
- `scheduler`: which versions are due, and which worker gets them
- `worker`: the server's own evaluation worker, a child process
"""
