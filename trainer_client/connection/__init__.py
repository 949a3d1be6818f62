"""The thread that sends snapshots, and its socket."""
