"""Averaging rules as values and as strings."""
