"""One run in memory: its averages, its state, its status."""
