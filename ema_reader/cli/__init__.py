"""The commands that read from a server.

- `commands`: registers all commands; `status`, `versions`, `download`, `healthcheck`
- `metrics`: `metrics` and `best`
- `push`: `push`
- `watch`: `watch`
- `evaluate`: `evaluate`, `validate` and `recalibrate`
- `averages`: `averages` and `ledger`
- `synthesize`: `synthesize`
- `blend`: `blend`
- `sweep`: several derived versions, evaluated and compared: what `synthesize` and `blend` share
- `options`: options, checks of arguments and exit codes that the commands share
- `render`: values as text for people, and as JSON for programs
- `tables`: aligned columns that fit into a terminal
"""
