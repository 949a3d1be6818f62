"""An average as a repository of the Hugging Face Hub, `RUN/AVERAGE`, whose commits are its versions.

These modules are functions of values; the routes are in `ema_server/http/routes/hub.py`.

- `schemas`: the JSON of the Hub's protocol, as types
- `card`: the model card of a version, `README.md`, and its scores as the Hub lists them
- `commit`: the files of a version as those of a commit, with their object ids in git
"""
