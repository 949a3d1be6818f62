"""From the socket to whole, finite snapshots."""
