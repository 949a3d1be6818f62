"""One module per resource of the HTTP API: its routes, its JSON and its logic.

- `health`: whether the event loop answers, and whether the server does its work
- `prometheus`: counters, gauges and run statuses for Prometheus
- `runs`: list runs, get one
- `averages`: the averages of a run: their status, add one, remove one
- `versions`: list versions, get one, publish now
- `files`: the files of a version, with ranges and validators
- `ledgers`: the steps inside a version with their shares
- `derived`: what `synthesize`, `blend` and `recalibrate` share, and the deletion of derived versions
- `synthesize`: a power average that was not kept, made of stored ones
- `blend`: the weighted sum of versions
- `recalibrate`: a version with other buffers
- `metrics`: evaluation metrics: report them, list them
- `validations`: ask for an evaluation and wait for its result
- `leases`: what evaluation workers call
- `hub`: the read routes of the Hugging Face Hub
"""
