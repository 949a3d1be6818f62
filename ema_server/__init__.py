"""The keeper: takes snapshots in, averages them, keeps generations on disk, and serves versions over HTTP."""
