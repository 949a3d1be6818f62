"""One module per resource of the HTTP API.

- `averages`: routes for the averages of a run
- `blob`: one file of a version as a response
- `derive`: derived versions as requests see them
- `derived`: routes for versions that are made of others after them
- `derived_schemas`: the JSON of versions that are made of others, as types
- `files`: routes for the files of a version
- `health`: routes for machines that watch the server
- `lease_schemas`: the JSON of leases and validations as types
- `leases`: routes for workers
- `ledgers`: the steps inside a version as streamed JSON
- `metrics`: routes for evaluation metrics
- `prometheus`: the state of the server for Prometheus
- `readiness`: whether the server does its work
- `recalibrate`: from uploaded buffers to the version that has them, or to the problem that says why t
- `reports`: reports of workers
- `runs`: routes for runs
- `synthesize`: from a wish for another power average to its version, or to the problem that says why
- `validate`: from a wish to validate to a result, without blocking the event loop
- `validations`: routes for whoever wants a version validated now
- `versions`: routes for versions
"""
